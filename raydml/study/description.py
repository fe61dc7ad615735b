"""What a study's event file and its runs in MLflow say about it: its parameters, its images, its user and command."""

from __future__ import annotations

import getpass
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raydml.analysis.trials import constant, parameters_of, varying
from raydml.data.catalog import Catalog
from raydml.study.folder import read_json


def description_of(folder: Path, study_json: Mapping[str, Any], catalog: Catalog) -> dict[str, Any]:
    """Return ``constant``, ``varying``, ``splits``, ``user`` and ``command`` (see `raydml.study.events.StudyState`)."""
    parameters = [parameters_of(trial) for trial in study_json["trials"]]
    # Of trials that are drawn later, also what differs between none of those that stand for them.
    names = list(dict.fromkeys([*varying(parameters), *study_json.get("varying", ())]))
    return {
        "constant": {name: value for name, value in constant(parameters).items() if name not in names},
        "varying": names,
        "splits": sizes_of_splits(folder, catalog),
        "user": study_json.get("user") or _user(),
        "command": study_json.get("command") or "",
    }


def sizes_of_splits(folder: Path, catalog: Catalog) -> dict[str, dict[str, dict[str, int]]]:
    """Return the numbers of images and classes: ``{"fold 0": {"train": {"images": 120, "classes": 4}, ...}, ...}``.

    Nothing where split.json was deleted.
    """
    images = Counter(catalog.class_names[label] for label in catalog.labels.tolist())
    if not (folder / "split.json").exists():
        return {}
    splits = read_json(folder / "split.json")
    first = {name.rpartition(" ")[0]: name for name in reversed(splits)}  # of several data sets the first
    return {
        place: {
            part: {"images": sum(images[one] for one in classes), "classes": len(classes)}
            for part, classes in splits[name].items()
        }
        for place, name in first.items()
    }


def _user() -> str:
    """Return the user of this process: on the head of a cluster often the same one for all studies."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return ""
