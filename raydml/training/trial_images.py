"""The images of a trial: its catalog, its split and its pixels."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from raydml.config.sections import Data, ExtraTest
from raydml.config.trial import Machine, Trial, fingerprint
from raydml.data.benchmarks import published_catalog
from raydml.data.catalog import WITHOUT_FILES, Catalog, DataError, listed, log_notes
from raydml.data.datasets import open_catalog
from raydml.data.digests import ImageRecord
from raydml.data.seal import TestKey, TestReads
from raydml.data.splits import Split, make_split
from raydml.images.cache import Images, Storage, load_development, load_test
from raydml.images.pack import OnChanged
from raydml.images.preprocessing import Preprocessing
from raydml.training.checkpoint import git_commit


class OpenedImages(NamedTuple):
    """trial: with ``data.content`` filled in. train, val: the parts of the split, without any test image."""

    trial: Trial
    catalog: Catalog
    split: Split
    train: Images
    val: Images


class Catalogs:
    """The catalogs of the data sets of several trials; each is listed once, because a large one takes seconds.

    as_published: the catalogs of benchmarks have the published counts, and no image is looked for. record: of the
    bytes of a study's images, with which those that are opened are compared. on_changed: "accept" for a new study,
    which takes images as they are; otherwise images that have changed since they were decoded are refused.
    """

    def __init__(
        self,
        machine: Machine,
        *,
        as_published: bool = False,
        record: ImageRecord | None = None,
        on_changed: OnChanged = "refuse",
    ) -> None:
        self.machine, self.record, self.on_changed = machine, record, on_changed
        self._as_published = as_published
        self._opened: dict[str, Catalog] = {}

    def recorded(self, record: ImageRecord, on_changed: OnChanged = "refuse") -> "Catalogs":
        """These catalogs with another record."""
        other = Catalogs(self.machine, as_published=self._as_published, record=record, on_changed=on_changed)
        other._opened = self._opened
        return other

    def of(self, trial: Trial) -> Catalog:
        """The catalog of a trial's data set. Raises DataError, also if its content differs from ``data.content``."""
        data = trial.data
        key = data.images_key()
        if key not in self._opened:
            self._opened[key] = (
                published_catalog(data.name)
                if self._as_published and data.name not in WITHOUT_FILES
                else open_catalog(
                    data.name,
                    self.machine.data_root,
                    data.list_file,
                    cache_dir=self.machine.cache_dir,
                    **data.images_settings(),
                )
            )
            log_notes(self._opened[key].notes)
        catalog = self._opened[key]
        if data.content not in ("", catalog.content):
            missing = [] if self.record is None else self.record.missing_in(catalog, data.content)
            named = f" Missing: {listed(missing)}." if missing else ""
            raise DataError(
                f"data.content: the trial was made for images with the hash {data.content[:12]}, the images "
                f"in machine.data_root = {str(catalog.root)!r} have {catalog.content[:12]}.{named} Cure: restore the "
                "images, point machine.data_root at them, or leave data.content empty"
            )
        return catalog

    def extra(self, extra: ExtraTest) -> Catalog:
        """The catalog of an extra test; no image is opened. Raises DataError, which names the test."""
        key = extra.model_dump_json()
        if key not in self._opened:
            root = None if self.machine.data_root is None else self.machine.data_root / Path(extra.root).expanduser()
            settings = extra.model_dump(exclude={"name", "data", "root", "list_file"})
            try:
                found = open_catalog(extra.data, root, extra.list_file, cache_dir=self.machine.cache_dir, **settings)
            except DataError as error:
                raise DataError(f"data.extra_tests: {extra.name}: {error}") from error
            self._opened[key] = found
            log_notes(f"{extra.name}: {note}" for note in found.notes)
        return self._opened[key]


def with_content(trial: Trial, catalog: Catalog) -> Trial:
    """Return the trial with the hash of its images, so that its fingerprint identifies the experiment."""
    return trial.model_copy(update={"data": trial.data.model_copy(update={"content": catalog.content})})


def split_for(trial: Trial, catalog: Catalog) -> Split:
    """The classes of each part in this trial."""
    return make_split(catalog, **trial.data.split.model_dump())


def open_development(
    trial: Trial,
    machine: Machine,
    *,
    augmented: bool = True,
    catalogs: Catalogs | None = None,
    reads: TestReads | None = None,
) -> OpenedImages:
    """Open the development images of a trial. Raises DataError.

    augmented False: the training images as evaluation sees them, also where ``data.cache`` is off. catalogs: of this
    machine, where the images may have been listed before. reads: where a trial that trains on every class
    (``data.split.test_fraction: 0``) records that it opens classes on which others are tested; such a trial needs it.
    """
    catalogs = catalogs or Catalogs(machine)
    catalog = catalogs.of(trial)
    if trial.data.split.test_fraction == 0:
        if reads is None:
            raise DataError(
                "data.split.test_fraction = 0: every class trains, also those that are sealed otherwise, and "
                "each read of them is recorded. Pass reads=TestReads(FILE)"
            )
        purpose, commit = "training on all classes", git_commit() or "unknown"
        name = f"trial {fingerprint(with_content(trial, catalog))}"  # the name that the trial has in every output
        reads.record(purpose=purpose, checkpoint=name, commit=commit).spend()
    split = split_for(trial, catalog)
    original = augmented and trial.data.cache == "off"
    train, val = load_development(catalog, split, _storage_of(trial, machine, catalogs), original=original)
    return OpenedImages(with_content(trial, catalog), catalog, split, train, val)


def open_test(trial: Trial, machine: Machine, key: TestKey, catalogs: Catalogs | None = None) -> tuple[Catalog, Images]:
    """Open the test images of a trial and spend the key. Raises DataError."""
    catalogs = catalogs or Catalogs(machine)
    catalog = catalogs.of(trial)
    return catalog, load_test(catalog, split_for(trial, catalog), _storage_of(trial, machine, catalogs), key=key)


def _storage_of(trial: Trial, machine: Machine, catalogs: Catalogs) -> Storage:
    # A trial that names the hash of its images was made for those that were there; any other takes what is there. What
    # was there is in the record of the study. Without one the images in the cache count, which may be another study's.
    record, content = catalogs.record, trial.data.content
    is_recorded = record is not None and record.has(content)
    on_changed: OnChanged = catalogs.on_changed if content and not is_recorded else "accept"
    return replace(storage_for(trial.data, machine), on_changed=on_changed, record=record)


def storage_for(sizes: Data | Preprocessing, machine: Machine) -> Storage:
    """The storage of images that are decoded and resized in this way."""
    return Storage(
        resize_px=sizes.resize_px,
        resize=sizes.resize,
        interpolation=sizes.interpolation,
        cache_dir=machine.cache_dir,
        max_bytes=None if machine.max_cache_gib is None else int(machine.max_cache_gib * 2**30),
        on_unreadable=machine.on_unreadable,
    )
