"""Unpacking hostile archives: the whole folder or nothing, and nothing outside of it."""

import gzip
import io
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from raydml.data import archives
from raydml.data.archives import unpack
from raydml.data.catalog import DataError

FILES = {
    "birds/images.txt": b"1 a/one.jpg\n",
    "birds/images/a/one.jpg": random.Random(1).randbytes(5_000),
    "birds/images/b/empty.jpg": b"",
    "birds/images/b/block.jpg": b"x" * 512,
    "birds/images/b/B.jpg": "letter case and ünicode".encode(),
    "birds/images/c d/größe.jpg": b"blank",
}
KINDS = ("tar", "zip")


def entry(name, content=b"x", **more):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in more.items():
        setattr(info, key, value)
    return info, content


def tar_bytes(entries, format=tarfile.PAX_FORMAT):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as file:
        for info, content in entries:
            file.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def make_tar(folder, files, extra=(), **more):
    """A tar.gz file in a folder; extra: pairs of TarInfo and content behind the files."""
    entries = [entry(name, content) for name, content in files.items()] + list(extra)
    (folder / "archive").write_bytes(gzip.compress(tar_bytes(entries, **more), mtime=0))
    return folder / "archive"


def make_zip(folder, files, extra=()):
    """A zip file in a folder; extra: pairs of ZipInfo and content behind the files."""
    with zipfile.ZipFile(folder / "archive", "w", zipfile.ZIP_DEFLATED) as file:
        for info, content in [*((zipfile.ZipInfo(name), content) for name, content in files.items()), *extra]:
            file.writestr(info, content, zipfile.ZIP_DEFLATED)
    return folder / "archive"


def make(kind, folder, files, extra_files=()):
    if kind == "tar":
        return make_tar(folder, files, [entry(*pair) for pair in extra_files])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)  # zipfile's remark on a name that is there twice
        return make_zip(folder, files, [(zipfile.ZipInfo(name), content) for name, content in extra_files])


@pytest.fixture
def root(tmp_path):
    """The folder to unpack into; the archive lies outside, and so does what must not be touched."""
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


def tree(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if not path.is_dir()
    }


def everything(folder):
    """Every path below, links and folders too, to see that nothing changed."""
    return sorted(
        (path.as_posix(), path.is_symlink() or path.is_dir() or path.read_bytes()) for path in folder.rglob("*")
    )


def refused(archive, root, match, **more):
    before = everything(root.parent)
    with pytest.raises(DataError, match=match):
        unpack(archive, root, "birds", **{"max_bytes": 10**7, **more})
    assert everything(root.parent) == before


@pytest.mark.parametrize("kind", KINDS)
def test_every_file_of_the_folder_arrives_and_other_entries_stay_out(kind, root, tmp_path):
    others = [("attributes.txt", b"not needed"), ("__MACOSX/birds/._images.txt", b"junk"), ("birdsong/a", b"")]
    archive = make(kind, tmp_path, FILES, others)
    seen = []
    left_out = unpack(archive, root, "birds", max_bytes=10**7, progress=lambda done, total: seen.append((done, total)))
    assert tree(root) == FILES
    assert left_out == ("attributes.txt", "__MACOSX", "birdsong")
    assert [path.name for path in root.iterdir()] == ["birds"]
    assert len(seen) == len(FILES) + 3
    assert seen == sorted(seen) or kind == "zip"
    assert {total for _, total in seen} == {archive.stat().st_size}
    assert all(0 < done <= total for done, total in seen)


def test_folders_a_leading_dot_and_long_names_are_legal(root, tmp_path):
    long_name = "birds/" + "/".join(["long" * 20] * 5) + "/x.jpg"
    extra = [entry("./", b"", type=tarfile.DIRTYPE), entry("./birds/empty", b"", type=tarfile.DIRTYPE)]
    for style in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        files = {f"./{name}": content for name, content in FILES.items()} | {long_name: b"long"}
        unpack(make_tar(tmp_path, files, extra, format=style), root, "birds", max_bytes=10**7)
        assert tree(root) == FILES | {long_name: b"long"}
        assert (root / "birds" / "empty").is_dir()
        shutil.rmtree(root / "birds")


def test_modes_and_owners_are_not_taken_over(root, tmp_path):
    extra = [entry("birds/run.sh", b"x", mode=0o4777, uid=12345, mtime=0), entry("birds/closed", b"x", mode=0)]
    unpack(make_tar(tmp_path, FILES, extra), root, "birds", max_bytes=10**7)
    for name in ("run.sh", "closed"):
        found = (root / "birds" / name).stat()
        assert stat.S_IMODE(found.st_mode) & 0o7133 == 0
        assert stat.S_IMODE(found.st_mode) & 0o600 == 0o600
        assert (found.st_uid, found.st_mtime > 10**9) == (os.getuid(), True)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_there_is_not_touched(kind, root, tmp_path):
    archive = make(kind, tmp_path, FILES)
    (root / "birds").mkdir()
    refused(archive, root, "exists already")
    (root / "birds").rmdir()
    (root / "birds").symlink_to(tmp_path / "nowhere")
    refused(archive, root, "exists already")


@pytest.mark.parametrize("kind", KINDS)
def test_an_archive_without_the_folder_says_what_it_has(kind, root, tmp_path):
    refused(make(kind, tmp_path, {"fish/a": b"x", "readme": b""}), root, "no folder 'birds', only 'fish', 'rea")
    refused(make(kind, tmp_path, {"birds": b"a file"}), root, "no folder 'birds'")
    refused(make(kind, tmp_path, {}), root, "no folder 'birds', only nothing")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name",
    [
        *("/precious", "//precious", "../precious", "..", "birds/..", "other/../precious", "birds/../../precious"),
        *("birds/a/../../../precious", "C:/precious", "C:precious", "C:\\precious", "birds\\..\\..\\precious"),
        "\\\\host\\share\\x",
    ],
)
def test_names_that_lead_out_are_refused(kind, root, tmp_path, name):
    refused(make(kind, tmp_path, FILES, [(name, b"evil")]), root, "not a plain relative path: refused")


def test_a_name_with_a_nul_is_refused(root, tmp_path):
    extra = [entry("birds/x", b"x", pax_headers={"path": "birds/a.jpg\0.exe"})]
    refused(make_tar(tmp_path, FILES, extra), root, "not a plain relative path|damaged")
    archive = make_zip(tmp_path, {**FILES, "birds/aQ.exe": b"x"})
    archive.write_bytes(archive.read_bytes().replace(b"birds/aQ.exe", b"birds/a\0.exe"))
    refused(archive, root, "not a plain relative path")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
@pytest.mark.parametrize("target", ["/etc/hostname", "../../precious", "images.txt"])
def test_links_and_devices_in_a_tar_are_refused(root, tmp_path, kind, target):
    extra = [entry("birds/odd", b"", type=kind, linkname=target, devmajor=1, devminor=3)]
    refused(make_tar(tmp_path, FILES, extra), root, "'birds/odd' of the archive is a link, a device or sparse")
    extra[0][0].name = "elsewhere"
    refused(make_tar(tmp_path, FILES, extra), root, "'elsewhere' of the archive is a link")


SPARSE = {"GNU.sparse.major": "0", "GNU.sparse.size": "9000000000000", "GNU.sparse.map": "0,1"}


@pytest.mark.parametrize(
    ("extra", "match"),
    [
        (
            [entry("birds/out", b"", type=tarfile.SYMTYPE, linkname="../.."), entry("birds/out/precious", b"evil")],
            "'birds/out' of the archive is a link",
        ),
        ([entry("birds/sparse", b"", pax_headers=SPARSE)], "link, a device or sparse: refused"),
    ],
    ids=["writing through a linked folder", "sparse"],
)
def test_a_linked_folder_and_a_sparse_file_are_refused(root, tmp_path, extra, match):
    refused(make_tar(tmp_path, FILES, extra), root, match)


@pytest.mark.parametrize(
    "headers",
    [
        {"GNU.sparse.map": "abc"},
        {"GNU.sparse.size": "x"},
        {"GNU.sparse.realsize": "zz"},
        {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"},
    ],
)
def test_sparse_headers_that_are_no_numbers_are_damage(root, tmp_path, headers):
    refused(make_tar(tmp_path, FILES, [entry("birds/odd", b"", pax_headers=headers)]), root, "damaged|sparse: refused")


def test_a_zip_member_shorter_than_announced_is_damage(root, tmp_path):
    data = bytearray(make_zip(tmp_path, FILES).read_bytes())
    place = data.index(b"PK\x01\x02") + 24  # the uncompressed size of images.txt in the central directory
    assert data[place : place + 4] == (12).to_bytes(4, "little")
    data[place : place + 4] = (5_000).to_bytes(4, "little")
    (tmp_path / "archive").write_bytes(data)
    refused(tmp_path / "archive", root, "damaged .*'birds/images.txt' has 12 bytes where 5,000 are announced")


@pytest.mark.parametrize("mode", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO, stat.S_IFSOCK])
def test_links_and_devices_in_a_zip_are_refused(root, tmp_path, mode):
    info = zipfile.ZipInfo("birds/odd")
    info.create_system, info.external_attr = 3, (mode | 0o777) << 16
    refused(make_zip(tmp_path, FILES, [(info, b"../../precious")]), root, "'birds/odd' .* link or a device")


def test_an_encrypted_member_is_refused(root, tmp_path):
    data = bytearray(make_zip(tmp_path, FILES).read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + offset] |= 1
    (tmp_path / "archive").write_bytes(data)
    refused(tmp_path / "archive", root, "encrypted")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", ["birds/images.txt", "birds/./images.txt", "birds//images.txt", "birds/images", "birds/images.txt/x"]
)
def test_two_members_for_one_file_are_refused(kind, root, tmp_path, name):
    """On a file system that folds letter case, IMAGES.TXT is the same file: exclusive creation sees what it sees."""
    refused(make(kind, tmp_path, FILES, [(name, b"second")]), root, "twice, as a file and a folder, or under")


@pytest.mark.parametrize("kind", KINDS)
def test_more_bytes_than_the_maximum_are_refused(kind, root, tmp_path):
    archive = make(kind, tmp_path, FILES, [("birds/bomb", bytes(3_000_000))])
    assert archive.stat().st_size < 30_000
    refused(archive, root, "unpacks to more than 2,999,999 bytes, its maximum", max_bytes=2_999_999)
    refused(make(kind, tmp_path, FILES, [("fish/bomb", bytes(3_000_000))]), root, "more than", max_bytes=10**6)


def test_a_bomb_is_refused_before_it_is_written(root, tmp_path):
    """Its header announces an exabyte; nothing of it need be there."""
    huge = tarfile.TarInfo("birds/bomb")
    huge.size = 10**18
    stream = tar_bytes([entry("birds/a")])[:1024] + huge.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 20)
    (tmp_path / "archive").write_bytes(gzip.compress(stream))
    refused(tmp_path / "archive", root, "unpacks to more than 10,000,000 bytes")
    refused(tmp_path / "archive", root, "unpacks to more than [0-9,]+ bytes, the free space", max_bytes=10**19)


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_a_header_of_many_megabytes_is_refused_before_it_is_read(root, tmp_path, kind):
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = kind, 64 << 20
    stream = tar_bytes([entry("birds/a")])[:1024] + header.tobuf(tarfile.GNU_FORMAT) + bytes(64 << 20)
    (tmp_path / "archive").write_bytes(gzip.compress(stream, 1))
    refused(tmp_path / "archive", root, "has a header of 67,108,864 bytes: refused", max_bytes=10**9)


def test_zeros_without_end_behind_the_archive_are_refused(root, tmp_path):
    stream = tar_bytes([entry("birds/a")]) + bytes(12_000_000)
    (tmp_path / "archive").write_bytes(gzip.compress(stream, 1))
    refused(tmp_path / "archive", root, "unpacks to more than 10,000,000 bytes")


@pytest.mark.parametrize("kind", KINDS)
def test_members_without_number_are_refused(kind, root, tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_NUM_MEMBERS", len(FILES) - 1)
    refused(make(kind, tmp_path, FILES), root, "more than 5 members")


@pytest.mark.parametrize("start", [b"", b"<!DOCTYPE html>", b"Rar!\x1a", bytes(512)])
def test_what_is_no_archive_is_said_to_be_none(root, tmp_path, start):
    (tmp_path / "archive").write_bytes(start)
    refused(tmp_path / "archive", root, "neither a zip nor a tar.gz file")


@pytest.mark.parametrize("kind", KINDS)
def test_an_archive_cut_anywhere_is_refused(kind, root, tmp_path):
    data = make(kind, tmp_path, FILES).read_bytes()
    for length in [*range(4, len(data), 97), len(data) - 8, len(data) - 1]:
        (tmp_path / "archive").write_bytes(data[:length])
        refused(tmp_path / "archive", root, "is damaged")


def test_a_broken_header_in_the_middle_is_not_taken_for_the_end(root, tmp_path):
    """tarfile alone would stop there and say nothing: the first files would look like all."""
    stream = bytearray(tar_bytes([entry(name, content) for name, content in FILES.items()]))
    second = stream.index(b"birds/images/a/one.jpg")
    stream[second + 150] ^= 1  # its checksum
    (tmp_path / "archive").write_bytes(gzip.compress(bytes(stream)))
    refused(tmp_path / "archive", root, "is damaged .*bad header")


@pytest.mark.parametrize("kind", KINDS)
def test_no_flipped_byte_gets_through_unseen(kind, root, tmp_path):
    """Either it is refused and nothing is left, or every byte of every file is right (names of headers may differ)."""
    data = make(kind, tmp_path, FILES).read_bytes()
    generator = random.Random(7)
    num_refused = 0
    for _ in range(200):
        damaged = bytearray(data)
        for _ in range(generator.choice([1, 1, 4])):
            damaged[generator.randrange(4, len(data))] ^= generator.randrange(1, 256)
        (tmp_path / "archive").write_bytes(damaged)
        try:
            unpack(tmp_path / "archive", root, "birds", max_bytes=10**7)
        except DataError:
            num_refused += 1
            assert list(root.iterdir()) == []
        else:
            assert set(tree(root).values()) <= set(FILES.values())
            shutil.rmtree(root / "birds")
    assert num_refused > 150
    assert (tmp_path / "precious").read_bytes() == b"precious"


def test_ctrl_c_leaves_nothing(root, tmp_path):
    archive = make_tar(tmp_path, FILES)

    def interrupt(_done, _total):
        assert not (root / "birds").exists(), "nothing is visible before all is there"
        if len(list(root.rglob("*.jpg"))) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        unpack(archive, root, "birds", max_bytes=10**7, progress=interrupt)
    assert list(root.iterdir()) == []


def test_what_a_kill_leaves_is_hidden_and_removed_the_next_time(root, tmp_path):
    archive = make_tar(tmp_path, FILES)
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom raydml.data.archives import unpack\n"
        "def wait(*_):\n    print('unpacking', flush=True)\n    time.sleep(60)\n"
        "unpack(Path(sys.argv[1]), Path(sys.argv[2]), 'birds', max_bytes=10**7, progress=wait)\n"
    )
    repository = Path(__file__).parents[2]
    command = [sys.executable, "-c", code, str(archive), str(root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=repository) as process:
        assert process.stdout.readline() == b"unpacking\n"
        process.send_signal(signal.SIGKILL)
        process.wait(20)
    (leftover,) = root.iterdir()
    assert leftover.name.startswith(".birds-extracting-")
    assert tree(leftover)
    (root / ".birds-extracting-link").symlink_to(tmp_path)  # not ours: we make folders
    (root / ".fish-extracting-x").mkdir()
    unpack(archive, root, "birds", max_bytes=10**7)
    assert tree(root / "birds") == {name.removeprefix("birds/"): content for name, content in FILES.items()}
    assert {path.name for path in root.iterdir()} == {"birds", ".birds-extracting-link", ".fish-extracting-x"}
    assert (tmp_path / "precious").read_bytes() == b"precious"


def test_a_folder_that_cannot_be_written_is_an_error_with_its_name(tmp_path):
    archive = make_tar(tmp_path, {"birds/" + "n" * 300: b"x"})
    (tmp_path / "root").mkdir()
    refused(archive, tmp_path / "root", "cannot unpack .*File name too long")
