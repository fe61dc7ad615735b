"""Checking whether a benchmark on the disk is the published one, complete and readable."""

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path

from raydml.data.benchmark_lists import differing_classes, read_list, refuse_lines, vehicleid_list, whole_numbers
from raydml.data.benchmarks import (
    BENCHMARKS,
    VEHICLEID_TESTS,
    benchmark_entries,
    benchmark_named,
    folder_of,
    part_counts,
)
from raydml.data.catalog import DataError, ImageEntry, find_files, images_below, listed
from raydml.ops.cores import num_usable_cores

_CHUNK = 64  # images that a thread decodes between two reports of progress
_DECIMAL = re.compile(r"\d+(\.\d+)?", re.ASCII)


@dataclass(frozen=True)
class CheckReport:
    """The result of a check. ok: nothing is wrong. lines: the counts and all faults, which begin with "WRONG"."""

    ok: bool
    lines: tuple[str, ...]


class _Findings:
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.num_wrong = 0

    def fine(self, text: str) -> None:
        self.lines.append(text)

    def wrong(self, text: str) -> None:
        self.lines.append(f"WRONG {text}")
        self.num_wrong += 1

    def attempt(self, read: Callable[[], list[ImageEntry]]) -> list[ImageEntry]:
        """Return what `read` returns; a DataError becomes a finding and an empty list."""
        try:
            return read()
        except DataError as error:
            self.wrong(str(error))
            return []


def check_benchmark(
    name: str,
    root: Path,
    *,
    fault_of: Callable[[Path, str], str | None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CheckReport:
    """Count and read the files in a folder that should hold a benchmark.

    Checked are every line of the lists (also CUB's bounding_boxes.txt and VehicleID's img2vid.txt where they exist),
    images and classes per part against the published counts, and files that are missing, empty or in no list. With
    fault_of every image is decoded too; damage that leaves a decodable picture is not noticed.

    name: a key of BENCHMARKS; "vehicleid" covers its three test sets, and every list that exists is checked. root: the
    folder of the data set, or the one that holds it. fault_of: (folder, path) -> the reason why an image cannot be
    used, or None; see images/pixels.py. progress: called with the images decoded so far and their total.

    All faults are in the report. Raises DataError only for an unknown name.
    """
    benchmark = benchmark_named(name)
    findings = _Findings()
    try:
        folder = folder_of(name, root)
    except (DataError, OSError) as error:
        findings.wrong(str(error))
        return _report(name, findings)
    findings.fine(f"{benchmark.title} in {folder}")
    entries = _vehicleid_lists(folder, findings) if name == "vehicleid" else _lists(name, folder, findings)
    if name == "cub200" and (folder / "bounding_boxes.txt").exists():
        findings.attempt(partial(_check_bounding_boxes, folder))
    if entries:
        intact = _check_files(folder, entries, findings)
        _check_unlisted(name, folder, entries, findings)
        if fault_of is not None:
            _decode(folder, intact, fault_of, findings, progress)
        else:
            findings.fine("the images were not decoded")
    return _report(name, findings)


def _report(name: str, findings: _Findings) -> CheckReport:
    if findings.num_wrong:
        verdict = f"{name} is not as published, see the {findings.num_wrong} WRONG above"
    else:
        verdict = f"{name} is as published"
    return CheckReport(findings.num_wrong == 0, (*findings.lines, verdict))


def _lists(name: str, folder: Path, findings: _Findings) -> list[ImageEntry]:
    entries = findings.attempt(partial(benchmark_entries, name, folder))
    if entries:
        for part, counts in part_counts(name, entries).items():
            _compare(name, part, counts, findings)
    return entries


def _compare(name: str, part: str, counts: tuple[int, int], findings: _Findings) -> None:
    published = BENCHMARKS[name].counts[part]
    text = f"{part}: {counts[0]:,} images of {counts[1]:,} classes"
    if published.fits(*counts):
        findings.fine(f"{text}, as published ({published.evidence})")
    else:
        findings.wrong(
            f"{text}, published are {published} ({published.evidence}): a part or a subset of {name}, or another data "
            "set in its format"
        )


def _vehicleid_lists(folder: Path, findings: _Findings) -> list[ImageEntry]:
    """Return the images of all lists that exist, each once."""
    parts = {"train": "train_list", **{f"test_{size}": f"test_list_{size}" for size in VEHICLEID_TESTS.values()}}
    found: dict[str, list[ImageEntry]] = {}
    for part, stem in parts.items():
        file = folder / "train_test_split" / f"{stem}.txt"
        if not file.exists():
            if part == "train":
                findings.wrong(f"train: there is no {file}")
            else:
                findings.fine(f"{part}: there is no {file}; it was not checked")
        elif entries := findings.attempt(partial(vehicleid_list, file)):
            found[part] = entries
            _compare("vehicleid", part, (len(entries), len({e.class_name for e in entries})), findings)
            if twice := len(entries) - len({e.path for e in entries}):
                findings.wrong(f"{part}: {twice:,} images of {file} are listed more than once")
    if not any(part.startswith("test") for part in found):
        findings.wrong("none of the test lists can be used")
    train_classes = {entry.class_name for entry in found.get("train", [])}
    for part, entries in found.items():
        if part != "train" and (shared := train_classes & {entry.class_name for entry in entries}):
            findings.wrong(f"{part}: {len(shared):,} vehicles are also in train_list.txt: {listed(sorted(shared))}")
    for one, other in combinations([part for part in found if part != "train"], 2):
        if vehicles := differing_classes(found[one], found[other]):
            findings.wrong(f"{one} and {other}: {len(vehicles):,} vehicles have other images: {listed(vehicles)}")
    _compare_with_img2vid(folder, found, findings)
    return list({entry.path: entry for entries in found.values() for entry in entries}.values())


def _compare_with_img2vid(folder: Path, found: dict[str, list[ImageEntry]], findings: _Findings) -> None:
    file = folder / "attribute" / "img2vid.txt"
    if not file.exists():
        return
    entries = findings.attempt(partial(vehicleid_list, file))
    if not entries:
        return
    vehicles = {entry.path: entry.class_name for entry in entries}
    _compare("vehicleid", "img2vid", (len(vehicles), len(set(vehicles.values()))), findings)
    for part, of_part in found.items():
        others = [entry.path for entry in of_part if vehicles.get(entry.path) != entry.class_name]
        if others:
            findings.wrong(f"{part}: {len(others):,} images have another vehicle in {file}: {listed(others)}")


def _check_bounding_boxes(folder: Path) -> list[ImageEntry]:
    """Raise DataError for boxes that are no numbers or of other images than images.txt lists; return no entries."""
    file = folder / "bounding_boxes.txt"
    lines = read_list(file, "image_id x y width height")
    wrong = [line for line in lines if not all(_DECIMAL.fullmatch(text) for text in line.fields[1:])]
    refuse_lines(file, "must give the box as decimal numbers", wrong)
    images_file = folder / "images.txt"
    image_ids = whole_numbers(images_file, read_list(images_file, "image_id path"), 0)
    if sorted(whole_numbers(file, lines, 0)) != sorted(image_ids):
        raise DataError(f"{file} has other images ({len(lines):,}) than {images_file.name} ({len(image_ids):,})")
    return []


def _check_files(folder: Path, entries: list[ImageEntry], findings: _Findings) -> list[str]:
    """Return the paths of the listed files that exist and are not empty."""
    files, missing = find_files(folder, entries)
    empty = [file.path for file in files if file.num_bytes == 0]
    for state, paths in (("missing", missing), ("of zero bytes", empty)):
        if paths:
            findings.wrong(f"{len(paths):,} of {len(entries):,} listed images are {state}: {listed(paths)}")
    if not missing:
        num_bytes = sum(file.num_bytes for file in files)
        findings.fine(f"all {len(entries):,} listed images exist, {num_bytes:,} bytes in all")
    return [file.path for file in files if file.num_bytes]


def _check_unlisted(name: str, folder: Path, entries: list[ImageEntry], findings: _Findings) -> None:
    known = {entry.path for entry in entries}
    used = {path.split("/")[0] for path in known}
    # Where two layouts are side by side, only the folders of the one that is read count.
    candidates = [place for place in BENCHMARKS[name].image_folders if not place or place in used]
    folders = [place for place in candidates if (folder / place).is_dir()]  # its images are missing otherwise
    faults: list[OSError] = []
    extra = sorted(
        path for place in folders for path in images_below(folder, place, faults.append) if path not in known
    )
    if faults:
        findings.wrong(f"{len(faults):,} folders cannot be listed: {listed(faults)}")
    if extra and BENCHMARKS[name].subset_listed:
        findings.fine(f"{len(extra):,} images are in no list, as is usual for {name}")
    elif extra:
        findings.wrong(f"{len(extra):,} images are in no list: {listed(extra)}")


def _decode(
    folder: Path,
    paths: list[str],
    fault_of: Callable[[Path, str], str | None],
    findings: _Findings,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Decode every file and report those that fail."""

    def faults_in(start: int) -> list[str]:
        pairs = ((path, fault_of(folder, path)) for path in paths[start : start + _CHUNK])
        return [f"{path} ({fault})" for path, fault in pairs if fault]

    corrupt: list[str] = []
    num_threads = min(16, max(4, num_usable_cores()))  # Pillow decodes without the interpreter lock
    starts = range(0, len(paths), _CHUNK)
    with ThreadPoolExecutor(num_threads, thread_name_prefix="decode") as pool:
        # Ctrl-C ends this loop; the iterator of map() then cancels the chunks that have not begun.
        for start, faults in zip(starts, pool.map(faults_in, starts), strict=True):
            corrupt += faults
            if progress is not None:
                progress(min(start + _CHUNK, len(paths)), len(paths))
    if corrupt:
        findings.wrong(f"{len(corrupt):,} of {len(paths):,} images cannot be decoded: {listed(corrupt)}")
    else:
        findings.fine(f"all {len(paths):,} images were decoded")
