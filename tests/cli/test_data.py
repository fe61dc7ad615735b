"""The commands data list, data download and data check: what they print, what they leave, how they exit."""

import gzip
import hashlib
import io
import re
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import filelock
import numpy as np
import pytest
from PIL import Image

from raydml.data.benchmarks import BENCHMARKS
from raydml.data.catalog import DataError
from raydml.data.download import LOCK_FILE, SOURCES, Archive, DownloadSource, install
from tests.cli import commands
from tests.data.file_server import Answer, file_server, ranges

ROOT = Path(__file__).parents[2]


def birds():
    """A tar.gz file in the layout of CUB-200-2011: 2 classes of 2 images; attributes.txt lies beside the folder."""
    picture = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 30, 60)).save(picture, "JPEG")
    paths = ["001.Wren/a.jpg", "001.Wren/b.jpg", "002.Tit/c.jpg", "002.Tit/d.jpg"]
    files = {
        "attributes.txt": b"1 has_bill\n",
        "CUB_200_2011/images.txt": "".join(f"{n} {path}\n" for n, path in enumerate(paths, 1)).encode(),
        "CUB_200_2011/image_class_labels.txt": b"1 1\n2 1\n3 2\n4 2\n",
        "CUB_200_2011/classes.txt": b"1 001.Wren\n2 002.Tit\n",
        **{f"CUB_200_2011/images/{path}": picture.getvalue() for path in paths},
    }
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as file:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return gzip.compress(stream.getvalue(), mtime=0)


BIRDS = birds()


@pytest.fixture
def server(monkeypatch):
    with file_server(monkeypatch) as server:
        server.answers = [Answer(BIRDS)]
        yield server


def source(server, **more):
    facts = {
        "url": server.url.replace("archive", "CUB_200_2011"),
        "file_name": "CUB_200_2011.tgz",
        "num_bytes": len(BIRDS),
        "sha256": hashlib.sha256(BIRDS).hexdigest(),
        "folder": "CUB_200_2011",
        "max_unpacked_bytes": 10**7,
    }
    return DownloadSource((Archive(**{**facts, **more}),), "Ask a friend.")


def run(*arguments):
    return commands.run("data", *arguments)


def done(*arguments):
    return commands.done("data", *arguments)


def refused(*arguments):
    return commands.refused("data", *arguments)


def words(text):
    return " ".join(text.split())


def test_every_benchmark_has_a_source_and_every_fact_is_well_formed():
    assert list(SOURCES) == list(BENCHMARKS)
    for name, one in SOURCES.items():
        assert one.by_hand.endswith(".")
        for archive in one.archives:
            assert archive.url.startswith(("http://", "https://"))
            assert archive.url.endswith(f"/{archive.file_name}")
            assert archive.folder in BENCHMARKS[name].folders, "what is unpacked must be found again"
            assert re.fullmatch(r"[0-9a-f]{64}", archive.sha256)
            assert archive.num_bytes < archive.max_unpacked_bytes


def test_the_facts_are_those_that_were_looked_up():
    """Typed once more from TensorFlow Datasets' url_checksums, so that a slip in the table is seen."""
    facts = {name: [(a.num_bytes, a.sha256[:8], a.sha256[-8:]) for a in one.archives] for name, one in SOURCES.items()}
    by_hand = {"cars196": [], "inshop": [], "vehicleid": []}
    cub200, sop = (1150585339, "0c685df5", "b49bf081"), (3083860082, "b04fa782", "b756ef48")
    assert facts == {"cub200": [cub200], "sop": [sop], **by_hand}


def test_list_shows_the_five_benchmarks_with_parts_and_size():
    result = done("list")
    text = words(result.stdout)
    for name, benchmark in BENCHMARKS.items():
        assert name in text
        assert all(part in text for part in benchmark.counts)
    for part in ("train 5,864 of 100", "gallery 12,612 of 3,985", "1.2 GB", "3.1 GB"):
        assert part in text
    assert text.count("by hand") == 3


def test_help_names_the_commands_and_options():
    text = run("--help").output
    assert all(f" {command} " in text for command in ("list", "download", "check"))
    assert "--sha256" in run("download", "--help").output
    assert "--quick" in run("check", "--help").output


@pytest.mark.parametrize("command", ["download", "check"])
def test_an_unknown_benchmark_is_refused_with_the_choices(tmp_path, command):
    error = refused(command, "cub20", "--root", tmp_path)
    choices = "choices: cub200, cars196, sop, inshop, vehicleid; did you mean 'cub200'?"
    assert f"'cub20' is no benchmark; {choices}" in error


def test_download_fetches_checks_and_unpacks_and_then_has_nothing_to_do(server, tmp_path, monkeypatch):
    monkeypatch.setitem(SOURCES, "cub200", source(server))
    root = tmp_path / "new" / "root"
    result = done("download", "cub200", "--root", root)
    assert f"is in {root / 'CUB_200_2011'}; check it with: launch.py data check cub200 --root {root}" in result.stdout
    assert "left in the archive: 'attributes.txt'" in result.stderr
    assert "not confirmed" not in result.output
    assert len(list((root / "CUB_200_2011" / "images").rglob("*.jpg"))) == 4
    assert {path.name for path in root.iterdir()} == {"CUB_200_2011", "CUB_200_2011.tgz", LOCK_FILE}
    for again in (root, root / "CUB_200_2011"):
        result = done("download", "cub200", "--root", again)
        assert f"is in {root / 'CUB_200_2011'} already" in result.stdout
    assert ranges(server) == [None]


def test_a_folder_that_is_there_but_is_no_data_set_is_left_alone_and_reported(server, tmp_path, monkeypatch):
    monkeypatch.setitem(SOURCES, "cub200", source(server))
    (tmp_path / "CUB_200_2011").mkdir()
    error = refused("download", "cub200", "--root", tmp_path)
    assert f"{tmp_path / 'CUB_200_2011'} exists already" in error
    assert "images.txt" in error
    assert server.requests == []


def test_a_folder_can_be_made_again_from_the_archive_without_the_network(server, tmp_path, monkeypatch):
    monkeypatch.setitem(SOURCES, "cub200", source(server))
    (tmp_path / "CUB_200_2011.tgz").write_bytes(BIRDS)
    done("download", "cub200", "--root", tmp_path)
    assert (tmp_path / "CUB_200_2011" / "images.txt").exists()
    assert server.requests == []


def test_an_archive_without_a_known_checksum_is_said_to_be_one(server, tmp_path, monkeypatch):
    monkeypatch.setitem(SOURCES, "cub200", source(server, sha256=None))
    result = done("download", "cub200", "--root", tmp_path)
    assert "checksum not confirmed, none is known" in result.stderr


def test_a_wrong_checksum_blocks_until_the_user_vouches_for_the_file(server, tmp_path, monkeypatch):
    monkeypatch.setitem(SOURCES, "cub200", source(server, sha256="0" * 64))
    error = refused("download", "cub200", "--root", tmp_path)
    assert not (tmp_path / "CUB_200_2011").exists()
    given = re.search(r"add --sha256 ([0-9a-f]{64})", error)[1]
    assert given == hashlib.sha256(BIRDS).hexdigest()
    done("download", "cub200", "--root", tmp_path, "--sha256", given)
    assert ranges(server) == [None]
    error = refused("download", "cub200", "--root", tmp_path / "other", "--sha256", "abc")
    assert "64 hexadecimal digits" in error


def test_what_is_not_served_ends_with_what_a_person_can_do(server, tmp_path, monkeypatch):
    server.answers = [Answer(b"", status=404)]
    monkeypatch.setitem(SOURCES, "cub200", source(server))
    assert f"By hand: Ask a friend. Put CUB_200_2011.tgz into {tmp_path}" in refused(
        "download", "cub200", "--root", tmp_path
    )


@pytest.mark.parametrize("name", ["cars196", "inshop", "vehicleid"])
def test_what_is_only_had_by_hand_says_how_and_where_to_put_it(tmp_path, name):
    root = tmp_path / "my data"
    error = refused("download", name, "--root", root)
    assert SOURCES[name].by_hand in error
    assert f"Make the folder {root / name} and" in error
    assert name in BENCHMARKS[name].folders, "where it is looked for"
    assert BENCHMARKS[name].layout in error
    assert f"launch.py data check {name} --root '{root}'" in error
    assert not root.exists()


def test_two_downloads_into_one_folder_are_one_too_many(server, tmp_path):
    def ignore(*_):
        pass

    with filelock.FileLock(tmp_path / LOCK_FILE), pytest.raises(DataError, match="another download is at work"):
        install(source(server), tmp_path, progress=ignore, report=ignore)
    assert server.requests == []
    install(source(server), tmp_path, progress=ignore, report=ignore)


def test_a_root_that_cannot_be_is_refused(server, tmp_path, monkeypatch):
    monkeypatch.setitem(SOURCES, "cub200", source(server))
    (tmp_path / "file").write_bytes(b"")
    assert "cannot write to the folder" in refused("download", "cub200", "--root", tmp_path / "file" / "root")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_download_goes_on_where_it_was(server, tmp_path, monkeypatch, how):
    half = len(BIRDS) // 2
    server.answers = [Answer(BIRDS, cut=half, stalls=True)]
    one = source(server)
    code = (
        # A shell that starts the tests in the background has them ignore Ctrl-C, and so would this child.
        "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import typer\nfrom raydml.cli import data, main\n"
        "from raydml.data.download import SOURCES, Archive, DownloadSource\n"
        f"SOURCES['cub200'] = {one!r}\n"
        "app = typer.Typer(cls=main.Commands)\napp.add_typer(data.data, name='data')\n"
        f"app(['data', 'download', 'cub200', '--root', {str(tmp_path)!r}])\n"
    )
    there = tmp_path / "CUB_200_2011.tgz.partial"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        for _ in range(1000):  # 20 s: before the connection counts as stalled
            if there.exists() and there.stat().st_size == half:
                break
            server.released.wait(0.02)
        process.send_signal(how)
        _, errors = process.communicate(timeout=60)
    assert there.read_bytes() == BIRDS[:half]
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert "the same command continues there" in errors
    else:
        assert process.returncode == -how
    server.answers = [Answer(BIRDS)]
    monkeypatch.setitem(SOURCES, "cub200", one)
    done("download", "cub200", "--root", tmp_path)
    assert ranges(server) == [None, f"bytes={half}-"]
    assert (tmp_path / "CUB_200_2011" / "images.txt").exists()


def test_check_prints_the_report_and_exits_by_it(tmp_path):
    with tarfile.open(fileobj=io.BytesIO(BIRDS)) as file:
        file.extractall(tmp_path, filter="data") if sys.version_info >= (3, 12) else file.extractall(tmp_path)
    result = run("check", "cub200", "--root", tmp_path)
    assert result.exit_code == 2, "4 images are not 11,788"
    assert "5,864" in result.stdout
    broken = tmp_path / "CUB_200_2011" / "images" / "001.Wren" / "a.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    assert "a.jpg" in run("check", "cub200", "--root", tmp_path).stdout
    assert "a.jpg" not in run("check", "cub200", "--root", tmp_path, "--quick").stdout


def test_check_without_a_data_set_is_the_users_mistake(tmp_path):
    result = run("check", "sop", "--root", tmp_path)
    assert (result.exit_code, "Ebay_train.txt" in result.output) == (2, True)


def test_duplicates_counts_and_shows_pairs_and_says_what_it_could_not_compare(tmp_path):
    generator = np.random.default_rng(0)
    for label in range(2):
        (tmp_path / f"class{label}").mkdir()
        for number in range(3):
            coarse = Image.fromarray(generator.integers(0, 256, (9, 12, 3), dtype=np.uint8))
            picture = coarse.resize((96, 80), Image.Resampling.BICUBIC)
            picture.save(tmp_path / f"class{label}" / f"{number}.png")
    picture.resize((70, 60)).save(tmp_path / "class0" / "copy.jpg")
    (tmp_path / "class1" / "broken.jpg").write_bytes(b"\xff\xd8\xffbroken")
    shown = done("duplicates", tmp_path)
    lines = shown.stdout.splitlines()
    assert lines[0] == "1 pair of two classes"
    assert lines[1].split()[1:] == ["class0/copy.jpg", "class1/2.png"]
    assert lines[2:] == ["0 pairs of one class"]
    assert "not compared: class1/broken.jpg" in shown.stderr
    assert "is no folder, no CSV file and no benchmark" in refused("duplicates", tmp_path / "nowhere")
