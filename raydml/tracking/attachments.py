"""What is stored with the run of a study without an event: the events of a study in an object store are its driver's.

Another process that wrote one would give its copy of the events a line that the driver's do not have, and the two could
not be told apart from a study that has gone on in both places.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from raydml.ops.addresses import redacted
from raydml.tracking.runs import OFFSET
from raydml.tracking.store import EXPERIMENT, TrackingError, connect, first_line, is_transient, look_at_store
from raydml.tracking.updates import File, file_of_test_read

LAST_READ = "raydml.last_test_read"
_NUM_FIRST = 20  # runs in which that of the study is looked for: it begins before those of its trials
PATIENCE_S = 20.0  # longest wait for the store's first answer


def log_folder(uri: str, study: Mapping[str, Any], folder: Path, artifact_path: str) -> None:
    """Store a folder with the run of a study. study: its study.json. Raises TrackingError."""
    with _run_of(uri, study) as (client, run):
        client.log_artifacts(run.info.run_id, str(folder), artifact_path)


def log_reads(uri: str, study: Mapping[str, Any], reads: Iterable[Mapping[str, Any]]) -> int:
    """Store records of `evaluate` with the run of a study, unless it has them; return how many were sent.

    study: its study.json. reads: lines of test_reads.jsonl. Those of a stage are left out: its driver has written an
    event of each. Raises TrackingError.
    """
    files = [_file_of(read) for read in reads if read.get("purpose") == "evaluate"]
    if not files:
        return 0
    with _run_of(uri, study) as (client, run):
        run_id = run.info.run_id
        known = {item.path for item in client.list_artifacts(run_id, "test_reads")}
        new = [file for file in files if file.artifact_path not in known]
        for file in new:
            client.log_text(run_id, file.text, file.artifact_path)
        last = max(Path(file.artifact_path).stem for file in files)
        if run.data.tags.get(LAST_READ, "") < last:
            client.set_tag(run_id, LAST_READ, last)
    return len(new)


def _file_of(read: Mapping[str, Any]) -> File:
    """Return the record of a read as it is stored for an event."""
    time_s = datetime.fromisoformat(read["time"]).timestamp()
    facts = {name: read.get(name) for name in ("checkpoint", "commit", "host")}
    return file_of_test_read({"time": time_s, "stage": "evaluate", "trial": None, **facts})


@contextmanager
def _run_of(uri: str, study: Mapping[str, Any]) -> Iterator[tuple[MlflowClient, Run]]:
    """Yield a client and the run of a study. Raises TrackingError where there is none, and where the store fails."""
    look_at_store(uri, PATIENCE_S)
    try:
        client = connect(uri)
        experiment = client.get_experiment_by_name(EXPERIMENT)
        found = [] if experiment is None else client.search_runs(
            [experiment.experiment_id],
            f"tags.`raydml.study_id` = '{study['study_id']}'",
            max_results=_NUM_FIRST,
            order_by=["attributes.start_time ASC"],
        )  # fmt: skip
        own = [run for run in found if "raydml.trial" not in run.data.tags]
        if not own:
            raise TrackingError(
                f"MLflow at {redacted(uri)} has no run of study {study['name']!r}. Cure: send it the study"
            )
        yield client, max(own, key=lambda run: int(run.data.tags.get(OFFSET, 0)))
    except Exception as error:
        if isinstance(error, TrackingError) or not (
            isinstance(error, (MlflowException, OSError)) or is_transient(error)
        ):
            raise
        raise TrackingError(f"MLflow at {redacted(uri)} does not take it: {first_line(error)}") from error
