"""Studies without pictures, which take most of the time of a small one: 17 of its 24 s."""

from pathlib import Path


def leave_pictures_out(folder: Path) -> Path:
    """Put the index of no pictures where a study, which may not be made yet, has its folder, and return that folder.

    A study draws no pictures where their index is. Those of `tests/study/test_stages.py` (on Ray), of
    `tests/study/test_stored_study.py` (in a store) and of `tests/cli/test_any_folder.py` (by the command) have theirs.
    """
    index = folder / "illustrations" / "illustrations.json"
    if not index.exists():
        index.parent.mkdir(parents=True, exist_ok=True)
        index.write_text("[]\n")
    return folder
