"""The annotations of a MATLAB file, read in a process of its own: a damaged file can end the process inside scipy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

_TIMEOUT_S = 120.0  # the files of Cars196 take less than a second


class UnreadableAnnotations(ValueError):
    """A file that scipy cannot read, or that has other content than annotations."""


def read_annotations(file: Path, path_field: str) -> tuple[list[str], list[int]]:
    """Return the texts of one field of the array ``annotations``, and the numbers of its field ``class``.

    Raises UnreadableAnnotations.
    """
    question = json.dumps({"file": str(file.resolve()), "path_field": path_field})
    command = [sys.executable, str(Path(__file__).resolve())]
    try:
        done = subprocess.run(command, input=question, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise UnreadableAnnotations(f"reading it takes longer than {_TIMEOUT_S:g} s") from error
    if done.returncode < 0:
        raise UnreadableAnnotations(f"reading it ended the process with signal {-done.returncode}")
    if done.returncode:
        last_line = next(reversed(done.stderr.strip().splitlines()), "")
        raise UnreadableAnnotations(last_line or f"reading it ended with code {done.returncode}")
    found = json.loads(done.stdout)
    if lacking := found.get("lacking"):
        raise UnreadableAnnotations(
            f"annotations have no {' and no '.join(lacking)}; they have {', '.join(found['fields'])}"
        )
    return found["paths"], found["classes"]


def _read(file: str, path_field: str) -> dict[str, Any]:
    import numpy as np
    from scipy.io import loadmat

    annotations = np.atleast_1d(loadmat(file, squeeze_me=True, variable_names=["annotations"])["annotations"])
    fields = list(annotations.dtype.names or ())
    if lacking := [field for field in (path_field, "class") if field not in fields]:
        return {"lacking": lacking, "fields": fields}
    return {"paths": [str(name) for name in annotations[path_field]], "classes": [int(c) for c in annotations["class"]]}


if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its modules have the names of others
    json.dump(_read(**json.load(sys.stdin)), sys.stdout)
