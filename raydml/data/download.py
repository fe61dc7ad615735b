"""Downloading and installing a benchmark: each archive is fetched over HTTP, checked and unpacked.

A download is resumed after a break and gets its own name only when its size and checksum are right. Until then
`<file>.partial` holds the bytes received so far and `<file>.partial.json` the version of the file that they begin, so
that a later call, also of another process, continues (RFC 9110, sections 13.1.5 and 14).

Sizes and checksums in SOURCES come from the tables of public libraries, named at each entry: they state what others
received from an address, not that it answers today.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import requests
import urllib3.exceptions

from raydml.data.archives import RESERVE_BYTES, unpack
from raydml.data.catalog import DataError, listed
from raydml.ops.files import digest_of, flush_to_disk, write_whole


@dataclass(frozen=True)
class Archive:
    """One file to fetch and the folder in it that holds the data set.

    url: http or https. file_name: its name on disk, ending in .zip, .tgz or .tar.gz. num_bytes: its size, None if
    unknown. sha256: of the file, None if unknown. folder: the top folder inside the archive that becomes root/<folder>.
    max_unpacked_bytes: an archive that holds more uncompressed is refused.
    """

    url: str
    file_name: str
    num_bytes: int | None
    sha256: str | None
    folder: str
    max_unpacked_bytes: int


@dataclass(frozen=True)
class DownloadSource:
    """How to get a benchmark. archives: what a program can fetch, perhaps nothing. by_hand: what a person can do."""

    archives: tuple[Archive, ...]
    by_hand: str


SOURCES: dict[str, DownloadSource] = {
    "cub200": DownloadSource(
        archives=(
            Archive(
                # Address: pytorch-metric-learning, datasets/cub.py. Many loaders give the md5
                # 97eceeb196236b17998738112f37df78 for it; torchvision-style loaders give the same md5 for a copy on
                # Google Drive, whose size and sha256 are in TensorFlow Datasets (url_checksums/caltech_birds2011.txt).
                url="https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
                file_name="CUB_200_2011.tgz",
                num_bytes=1_150_585_339,
                sha256="0c685df5597a8b24909f6a7c9db6d11e008733779a671760afef78feb49bf081",
                folder="CUB_200_2011",
                max_unpacked_bytes=4_000_000_000,
            ),
        ),
        by_hand=(
            "Fetch CUB_200_2011.tgz from https://data.caltech.edu/records/65de6-vp158 with a browser. "
            "Not the archive of 2010 (CUB-200), which has the same classes and other images."
        ),
    ),
    "cars196": DownloadSource(
        archives=(),
        by_hand=(
            "The official address (ai.stanford.edu/~jkrause/cars) has answered 404 since 2023. Get car_ims.tgz and "
            "cars_annos.mat from somebody who has them, or fetch a copy whose origin you trust. Public code names "
            "http://ftp.cs.stanford.edu/cs/cvgl/CARS196.zip (cars_annos.mat and the images); its checksum is unknown "
            "and raydml has not tried it."
        ),
    ),
    "sop": DownloadSource(
        archives=(
            Archive(
                # Address: ChainerCV. Size and sha256: TensorFlow Datasets (url_checksums/stanford_online_products.txt),
                # which gives them for this path at cs.stanford.edu by ftp.
                # Plain http is enough: the sha256 is checked.
                url="http://ftp.cs.stanford.edu/cs/cvgl/Stanford_Online_Products.zip",
                file_name="Stanford_Online_Products.zip",
                num_bytes=3_083_860_082,
                sha256="b04fa78210e69fab050ce73939550e1cd0f96890bdd98ec9fee732c3b756ef48",
                folder="Stanford_Online_Products",
                max_unpacked_bytes=12_000_000_000,
            ),
        ),
        by_hand=(
            "Fetch Stanford_Online_Products.zip with a browser: https://cvgl.stanford.edu/projects/lifted_struct, or "
            "the copy on Google Drive that the authors name, file 1TclrpQOF_ullUP99wk_gjGN8pKvtErG8."
        ),
    ),
    "inshop": DownloadSource(
        archives=(),
        by_hand=(
            "The authors share it on Google Drive, at https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion/"
            "InShopRetrieval.html: fetch Img/img.zip (the images of 256 x 256 px, not img_highres.zip) and "
            "Eval/list_eval_partition.txt, and unpack img.zip."
        ),
    ),
    "vehicleid": DownloadSource(
        archives=(),
        by_hand=(
            "PKU shares VehicleID on request, under a research agreement: https://www.pkuml.org. Unpack the files "
            "that you receive."
        ),
    ),
}


LOCK_FILE = ".raydml-download.lock"
_CHUNK_BYTES = 1 << 20
PROGRESS_BYTES = 1 << 20  # a try that brings this much does not count as failed
MAX_WAIT_S = 30.0
TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_PERMANENT = (
    requests.TooManyRedirects,
    requests.exceptions.InvalidSchema,
    requests.exceptions.MissingSchema,
    requests.exceptions.InvalidURL,
)

Progress = Callable[[int, int | None], None]  # bytes done, bytes in all (None: unknown)
Report = Callable[[str], object]


class NotServed(DataError):
    """A file that a program cannot get from its address; a person with a browser perhaps can."""


class _TryAgain(Exception):
    """A failure that may pass."""


class _StartAgain(_TryAgain):
    """A failure after which the bytes received so far are useless."""


class Patience(NamedTuple):
    """How long a download tries.

    stall_s: seconds without a byte before a connection is given up. num_retries: how many tries in a row may bring
    less than PROGRESS_BYTES after the first. wait_s: seconds before the first retry; doubles, up to MAX_WAIT_S.
    """

    stall_s: float = 30.0
    num_retries: int = 4
    wait_s: float = 1.0


def install(
    source: DownloadSource,
    root: Path,
    *,
    progress: Callable[[str, int, int | None], None],
    report: Report,
    accepted_sha256: str | None = None,
) -> list[Path]:
    """Put every archive of a source at root/<archive.folder>, and return these folders.

    An existing folder is left alone. The archives stay in root beside their folders, so that a damaged folder can be
    removed and made again without the network. progress: called with the stage, the bytes done and their total.
    accepted_sha256: see `fetch`.

    Raises DataError: another process works in root, or what `fetch` and `unpack` raise.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(root / LOCK_FILE, blocking=False):  # released when the process ends, also by a kill
            return [_install_one(archive, root, progress, report, accepted_sha256) for archive in source.archives]
    except filelock.Timeout as error:
        raise DataError(f"another download is at work in {root}. Wait for it, or give another --root") from error
    except OSError as error:
        raise DataError(f"cannot write to the folder {root}: {error}. Give another --root") from error


def _install_one(
    archive: Archive,
    root: Path,
    progress: Callable[[str, int, int | None], None],
    report: Report,
    accepted_sha256: str | None,
) -> Path:
    target = root / archive.folder
    if os.path.lexists(target):
        report(f"{target} exists already")
        return target
    file = fetch(
        archive, root, accepted_sha256=accepted_sha256, progress=partial(progress, "downloading"), report=report
    )
    if not accepted_sha256 and archive.sha256 is None:
        report(f"{archive.file_name}: checksum not confirmed, none is known")
    unpacking = partial(progress, "unpacking")
    others = unpack(file, root, archive.folder, max_bytes=archive.max_unpacked_bytes, progress=unpacking)
    if others:
        report(f"not needed and left in the archive: {listed(map(repr, others))}")
    report(f"{target} is complete; {file} may be removed")
    return target


def fetch(
    archive: Archive,
    folder: Path,
    *,
    patience: Patience = Patience(),  # noqa: B008 - immutable
    accepted_sha256: str | None = None,
    progress: Progress = lambda _done, _total: None,
    report: Report = lambda _text: None,
) -> Path:
    """Return the archive's file in `folder`, downloaded unless it exists; its size and sha256 are always checked.

    accepted_sha256: 64 hex digits that the user trusts; they replace the known size and sha256, and a file that was
    rejected before is accepted again. After any interruption, also Ctrl-C or a kill, the next call resumes.
    The caller must prevent two calls at once for one file.

    Raises NotServed: an answer that will not change (404, a redirect to another scheme, another size), or too many
    failed tries. Raises DataError: a wrong sha256 (the file is renamed to `<file>.rejected` and never resumed), a full
    disk, or an existing file that is not the expected one.
    """
    target = folder / archive.file_name
    rejected = folder / f"{archive.file_name}.rejected"
    if target.exists():
        if fault := _fault_of(target, archive, accepted_sha256):
            raise DataError(f"{target} exists already, but {fault}. Move it away and run the command again")
        return target
    if accepted_sha256 and rejected.exists() and not _fault_of(rejected, archive, accepted_sha256):
        rejected.replace(target)
        return target
    part = _PartialFile(folder, archive)
    try:
        _receive(archive, part, patience, accepted_sha256, progress, report)
        report(f"checking {archive.file_name}")
        if fault := _fault_of(part.path, archive, accepted_sha256):
            part.path.replace(rejected)
            part.remove()
            raise DataError(
                f"what came from {archive.url} is not {archive.file_name}: {fault}. It was moved to {rejected}; "
                "the same command starts from the beginning. If another source confirms this file, add --sha256 "
                f"{digest_of(rejected)}"
            )
        flush_to_disk(part.path)
        part.path.replace(target)
        part.remove()
    except OSError as error:  # of the disk: those of the network are caught before
        raise DataError(f"cannot write {part.path} ({error}); {part.how_to_continue()}") from error
    return target


def _fault_of(path: Path, archive: Archive, accepted_sha256: str | None) -> str:
    """Return why a file is not the archive, "" if it is; reads the whole file."""
    num_bytes, sha256 = path.stat().st_size, digest_of(path)
    if accepted_sha256:
        return "" if sha256 == accepted_sha256.lower() else f"its sha256 is {sha256}, not the one given with --sha256"
    if archive.num_bytes not in (None, num_bytes):
        return f"it has {num_bytes:,} bytes where {archive.num_bytes:,} are expected (its sha256 is {sha256})"
    return "" if archive.sha256 in (None, sha256) else f"its sha256 is {sha256} where {archive.sha256} is expected"


class _Version(NamedTuple):
    """One version of a file on a server. num_bytes: of the whole file; None where the server does not say."""

    url: str
    num_bytes: int | None
    etag: str | None
    last_modified: str | None

    @property
    def if_range(self) -> str | None:
        """The value of If-Range, where a weak ETag is not allowed: it promises the same meaning, not the same bytes."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.last_modified

    def contradicts(self, later: "_Version") -> bool:
        """Return whether a fact that both have differs."""
        return any(ours != theirs for ours, theirs in zip(self, later, strict=True) if None not in (ours, theirs))


class _PartialFile:
    """The bytes received so far and the version that they begin, both on disk."""

    def __init__(self, folder: Path, archive: Archive) -> None:
        self.path = folder / f"{archive.file_name}.partial"
        self._note = folder / f"{archive.file_name}.partial.json"
        self._archive = archive

    def num_bytes(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def version(self) -> _Version | None:
        """Return the version to continue, or None to start at the beginning.

        Bytes of an unknown version are only continued if a sha256 checks the result: two versions of a file could be
        joined unnoticed otherwise.
        """
        try:
            version = _Version(**json.loads(self._note.read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError, TypeError):  # never written completely
            return None
        can_check = version.if_range is not None or self._archive.sha256 is not None
        return version if self.num_bytes() and version.url == self._archive.url and can_check else None

    def begin(self, version: _Version) -> None:
        self.path.write_bytes(b"")  # first: a kill in between must not leave old bytes under a new version
        write_whole(self._note, json.dumps(version._asdict()))

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self._note.unlink(missing_ok=True)

    def how_to_continue(self) -> str:
        if not self.num_bytes():
            return "nothing has arrived; the same command tries again"
        return f"{self.num_bytes():,} bytes are in {self.path}, and the same command continues there"


def _receive(
    archive: Archive, part: _PartialFile, patience: Patience, accepted: str | None, progress: Progress, report: Report
) -> None:
    """Try until the file is complete. Only tries that get less than PROGRESS_BYTES beyond all earlier ones count as
    failed, so a long download over a bad line ends, and so does one that always breaks at the same byte."""
    num_failures, furthest = 0, part.num_bytes()
    with _Session() as session:
        while True:
            try:
                return _try_once(session, archive, part, patience.stall_s, accepted, progress)
            except _TryAgain as error:
                if isinstance(error, _StartAgain):
                    part.remove()
                there = part.num_bytes()
                num_failures = 1 if there >= furthest + PROGRESS_BYTES else num_failures + 1
                furthest = max(furthest, there)
                if num_failures > patience.num_retries:
                    raise NotServed(
                        f"cannot fetch {archive.url}: {error} ({num_failures} tries in a row); {part.how_to_continue()}"
                    ) from error
                wait_s = min(patience.wait_s * 2 ** (num_failures - 1), MAX_WAIT_S)
                report(f"{error}; {there:,} bytes have arrived, trying again in {wait_s:g} s")
            time.sleep(wait_s)


class _Session(requests.Session):
    """Follows redirects to http and https (all that requests can open), but not from https to http."""

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        target: str | None = super().get_redirect_target(resp)
        if target and resp.url.startswith("https:") and target.lower().startswith("http:"):
            raise NotServed(f"{resp.url} redirects to {target}, which is not encrypted")
        return target


def _try_once(
    session: _Session, archive: Archive, part: _PartialFile, stall_s: float, accepted: str | None, progress: Progress
) -> None:
    version = part.version()
    there = part.num_bytes() if version else 0
    if version and there == version.num_bytes:  # interrupted between the last byte and the check
        return
    headers = {"User-Agent": "raydml", "Accept-Encoding": "identity"}
    if version:
        headers |= {"Range": f"bytes={there}-"} | ({"If-Range": version.if_range} if version.if_range else {})
    try:
        with session.get(archive.url, headers=headers, stream=True, timeout=stall_s) as response:
            start, offered = _offered(response, archive.url)
            if start and (version is None or start != there or version.contradicts(offered)):
                raise _StartAgain("the file changed on the server, or it sent another part than the requested one")
            expected = None if accepted else archive.num_bytes
            total = expected if offered.num_bytes is None else offered.num_bytes
            if expected is not None and total != expected:
                raise NotServed(
                    f"{archive.url} offers {total:,} bytes where {expected:,} are expected: it is another file, "
                    "perhaps a page that explains why. Look at the address with a browser; if its file is right "
                    "nevertheless, give the sha256 of that file with --sha256"
                )
            _check_free_space(part.path.parent, (total or 0) - start)
            if start == 0:
                part.begin(offered)
            _append(response, part, start, total, progress)
    except (requests.Timeout, urllib3.exceptions.TimeoutError) as error:
        raise _TryAgain(f"no byte came for {stall_s:g} s") from error
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        if isinstance(error, _PERMANENT) or "CERTIFICATE_VERIFY_FAILED" in str(error):
            raise NotServed(f"cannot fetch {archive.url}: {error}") from error
        raise _TryAgain(f"the connection broke ({error})") from error


def _offered(response: requests.Response, url: str) -> tuple[int, _Version]:
    """Return the byte at which the body starts, and the version of the file that the server has."""
    answer = f"{response.status_code} {response.reason}"
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "").strip())
    if response.status_code == 416:
        raise _StartAgain(f"the server answered {answer}")
    if response.status_code in TRANSIENT_STATUS:
        raise _TryAgain(f"the server answered {answer}")
    if response.status_code == 200:
        start, num_bytes = 0, response.raw.length_remaining
    elif response.status_code == 206 and found:
        start, num_bytes = int(found[1]), None if found[2] == "*" else int(found[2])
    else:
        raise NotServed(f"{response.url} answers {answer} instead of sending a file")
    return start, _Version(url, num_bytes, response.headers.get("ETag"), response.headers.get("Last-Modified"))


def _append(response: requests.Response, part: _PartialFile, there: int, total: int | None, progress: Progress) -> None:
    """Write the body at the end of the partial file, whose first `there` bytes have arrived before."""
    progress(there, total)
    body: Any = response.raw
    with part.path.open("ab") as file:
        try:
            # read() would collect a whole chunk first and lose it when the connection stalls or Ctrl-C comes.
            while chunk := body.read1(_CHUNK_BYTES):
                there += len(chunk)
                if total is not None and there > total:
                    part.remove()
                    raise DataError(
                        f"{response.url} sends more than the {total:,} bytes that are expected: it is another file"
                    )
                file.write(chunk)
                file.flush()  # a kill must not lose what has arrived
                progress(there, total)
        except urllib3.exceptions.ProtocolError:
            if total is None:
                raise
    if total is not None and there < total:
        raise _TryAgain(f"the connection ended after {there:,} of {total:,} bytes")


def _check_free_space(folder: Path, num_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if num_bytes + RESERVE_BYTES > free_bytes:
        raise DataError(
            f"{folder} has {free_bytes:,} bytes free; {num_bytes:,} more are to come and {RESERVE_BYTES:,} stay in "
            "reserve. Make room or give another --root"
        )
