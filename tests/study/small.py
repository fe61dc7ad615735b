"""What makes a study of a test small: no pictures, and one process for all trials of a stage.

Pictures take 17 of the 24 s of a small study. Each process of Ray that trains or tests takes 7 s of processor time,
most of which are imports.
"""

from pathlib import Path

#: Options of `sweep`: the trials of a stage, and its tests, run one after the other in the same process.
ONE_PROCESS = ("--set", "study.search.max_concurrent=1")


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
