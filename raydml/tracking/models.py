"""Exported models in MLflow: stored with a run, registered as a version, and fetched again.

Everything goes through a client with its own address. ``mlflow.pyfunc.log_model`` would use MLflow's global tracking
address and end the run that it logs to; the functions here take the same steps without either.
"""

from __future__ import annotations

import base64
import importlib.metadata
import io
import json
import logging
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import mlflow.pyfunc
import numpy as np
import pandas as pd  # type: ignore[import-untyped,unused-ignore]
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput, LoggedModelStatus, Metric, Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.models.model import Model
from mlflow.types import Schema, TensorSpec
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS
from PIL import Image

import raydml
from raydml.ops.addresses import redacted
from raydml.study.events import Event, ExportedModel
from raydml.tracking.model_card import ModelFacts, facts_of
from raydml.tracking.store import TrackingError, connect, is_transient, without_retries
from raydml.tracking.updates import file_of_test_read, point_value, shortened

_logger = logging.getLogger(__name__)
MLFLOW_NOTE = "mlflow.note.content"

#: Name of the model within its run, and of the exported folder within the model.
MODEL = "model"
#: The alias of the newest winner, and of the best of those that can be compared with each other.
NEWEST, ALIAS = "challenger", "champion"
#: Tags of a version: what has to be equal for a comparison, the value compared, and how the comparison ended.
PROTOCOL_TAG, SCORE_TAG, COMPARED_TAG = "raydml.protocol", "raydml.score", "raydml.compared"
#: Tag of a version that no class validated: which classes it was trained on.
TRAINED_ON_TAG = "raydml.trained_on"
MAX_DESCRIPTION_CHARACTERS = 5000
#: What raydml.export needs to run, besides the raydml package, which is stored with the model.
REQUIREMENTS = ("torch", "torchvision", "numpy", "pillow", "safetensors", "mlflow")


class Origin(NamedTuple):
    """Where in MLflow a fetched model comes from: the store, the run, the study's name and its id. The last three are
    empty for a version that was registered by hand without a run."""

    uri: str
    run_id: str
    study: str
    study_id: str


def log_exported_model(
    client: MlflowClient, run_id: str, model: ExportedModel, study: Path | None = None, *, again: bool = False
) -> str:
    """Store an exported folder with the run and register it as a version of the model's name; return ``models:/...``.

    The version gets the alias ``challenger``. ``champion`` moves to it from an older version only if both were chosen
    by the same protocol on the same data and this one is better; the tag ``raydml.compared`` has the reason. The same
    model a second time changes nothing; one that broke off half-way is completed.

    study: the folder of its study, whose summary becomes the model card. again: also if it was deleted in MLflow.
    Raises FileNotFoundError if the folder is gone, and MlflowException.
    """
    name, source = model.name, model.checkpoint
    run = client.get_run(run_id)
    is_logged = any(_is_of(one, source) for one in run.data.tags.get("raydml.model_logged", "").splitlines())
    version = None if is_logged and not again else _version_of(client, name, run_id, source)
    if is_logged and (version is not None or not again):
        return run.data.tags.get("raydml.model", "")
    if not model.folder.is_dir():
        raise FileNotFoundError(f"the exported model {model.folder} does not exist any more")
    facts = facts_of(name, model.folder, study)
    version = version or _register(client, run, model, facts)
    if found := re.search(r"/(m-[0-9a-f]{32})/", version.source or ""):  # a database does not store its model_id
        # As MLflow's own register_model does: the page of the model then names the version.
        link = [{"name": name, "version": str(version.version)}]
        client.set_logged_model_tags(found.group(1), {MLFLOW_MODEL_VERSIONS: json.dumps(link)})
    _set_aliases(client, version, facts)
    logged = [*run.data.tags.get("raydml.model_logged", "").splitlines(), source]
    address = f"models:/{name}/{version.version}"
    client.set_tag(run_id, "raydml.model", address)
    client.set_tag(run_id, "raydml.model_logged", "\n".join(dict.fromkeys(logged)))
    return address


def is_registered(client: MlflowClient, run_id: str, model: ExportedModel) -> bool:
    """Return whether the registry has a version of the model."""
    return _version_of(client, model.name, run_id, model.checkpoint) is not None


def _set_aliases(client: MlflowClient, version: ModelVersion, facts: ModelFacts) -> None:
    """Make a version the challenger, and the champion if there is none or this one is better than it."""
    name = version.name
    client.set_registered_model_alias(name, NEWEST, version.version)
    champion = _champion(client, name)
    if champion is None or champion.version == version.version:
        client.set_registered_model_alias(name, ALIAS, version.version)
        return
    other = f"version {champion.version}"
    if facts.score is None or champion.tags.get(PROTOCOL_TAG) != facts.protocol:
        said = f"champion stays with {other}: its data, split or protocol is another, so the two cannot be compared"
    elif facts.score > float(champion.tags[SCORE_TAG]):
        client.set_registered_model_alias(name, ALIAS, version.version)
        said = f"champion moved here from {other}: {facts.label} against {float(champion.tags[SCORE_TAG]):.4f}"
    else:
        said = f"champion stays with {other}: {facts.label} against {float(champion.tags[SCORE_TAG]):.4f}"
    client.set_model_version_tag(name, version.version, COMPARED_TAG, said)
    _logger.info("models:/%s/%s: %s", name, version.version, said)


def _champion(client: MlflowClient, name: str) -> ModelVersion | None:
    version = client.get_registered_model(name).aliases.get(ALIAS)
    return None if version is None else client.get_model_version(name, str(version))


def _version_of(client: MlflowClient, name: str, run_id: str, source: str) -> ModelVersion | None:
    for version in client.search_model_versions(f"name = '{name}'"):
        if version.run_id == run_id and _is_of(version.tags.get("raydml.checkpoint", ""), source):
            return version
    return None


def _is_of(recorded: str, source: str) -> bool:
    """Return whether a recorded checkpoint is this one, a path within its study; older records are absolute."""
    return recorded == source or recorded.endswith(f"/{source}")


def _register(client: MlflowClient, run: Run, model: ExportedModel, facts: ModelFacts) -> ModelVersion:
    name, run_id = model.name, run.info.run_id
    tags = {
        key: run.data.tags[key] for key in ("raydml.study_id", "raydml.study", "raydml.trial") if key in run.data.tags
    }
    tags["raydml.checkpoint"] = model.checkpoint
    note = shortened(facts.card, MAX_DESCRIPTION_CHARACTERS)
    with without_retries():
        logged = client.create_logged_model(
            run.info.experiment_id,
            name=re.sub(r"""[/:.%"']""", "-", name),
            source_run_id=run_id,
            tags={**tags, MLFLOW_NOTE: note},
            params=facts.params,
            model_type="embedding",
        )
    try:
        with tempfile.TemporaryDirectory() as scratch:
            local = Path(scratch) / MODEL
            _save(local, model.folder, Model(run_id=run_id, model_uuid=logged.model_id, model_id=logged.model_id))
            client.log_model_artifacts(logged.model_id, str(local))
        logged = client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
        _log_output(client, run_id, logged.model_id)
        _log_metrics(client, run_id, logged.model_id, facts)
        if not client.search_registered_models(f"name = '{name}'"):
            with without_retries():
                client.create_registered_model(name)
        client.update_registered_model(name, note)
    except Exception:
        _discard(client, logged.model_id)
        raise
    tags |= {TRAINED_ON_TAG: facts.params["trained_on"]} if "trained_on" in facts.params else {}
    scored = {} if facts.score is None else {PROTOCOL_TAG: facts.protocol, SCORE_TAG: repr(facts.score)}
    # Outside of the try: where only the answer is lost, the version is there and needs the stored model.
    with without_retries():
        return client.create_model_version(
            name,
            # The location, not models:/ID: a database store would look that up at the global tracking address.
            source=logged.artifact_location,
            run_id=run_id,
            tags={**tags, **scored},
            model_id=logged.model_id,
            description=note,
            await_creation_for=None,  # a server of MLflow's own makes it at once, and the wait is printed
        )


def _log_output(client: MlflowClient, run_id: str, model_id: str) -> None:
    """Name the model as an output of its run; MLflow refuses it a second time, after an answer that was lost."""
    try:
        client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])
    except MlflowException:
        outputs = client.get_run(run_id).outputs
        if model_id not in [output.model_id for output in (outputs.model_outputs if outputs else [])]:
            raise


def _log_metrics(client: MlflowClient, run_id: str, model_id: str, facts: ModelFacts) -> None:
    """Store the scores with the model, those of the test classes with their images, so that models can be ranked."""
    now_ms = int(time.time() * 1000)
    name, digest = facts.test_data or (None, None)
    metrics = []
    for metric, value in facts.metrics.items():
        is_test = metric.startswith(("test/", "untrained/", "ensemble/", "refit/"))
        dataset = {"dataset_name": name, "dataset_digest": digest} if is_test else {}
        number = point_value(value)
        metrics.append(Metric(metric, number, now_ms, 0, model_id=model_id, run_id=run_id, **dataset))
    if metrics:
        client.log_batch(run_id, metrics)


def _discard(client: MlflowClient, model_id: str) -> None:
    """Delete a model that is stored in part; where the store cannot be reached it stays there as PENDING."""
    try:
        client.delete_logged_model(model_id)
    except Exception as error:
        if not is_transient(error):
            raise


def _save(local: Path, folder: Path, model: Model) -> None:
    package = Path(raydml.__file__).parent
    card = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    folder = folder.resolve()
    link = local.with_name("storage")  # MLflow would read %20, # and ? in the path of the folder as an address
    link.symlink_to(folder.parent)
    size, embedding_dim = int(card["preprocessing"]["resize_px"]), int(card["network"]["embedding_dim"])
    with _without_warnings():
        mlflow.pyfunc.save_model(
            path=str(local),
            python_model=str(package / "tracking" / "pyfunc_model.py"),
            artifacts={MODEL: str(link / folder.name)},
            code_paths=[str(package)],
            pip_requirements=requirements(),
            model_config={"device": "cpu"},  # a default, which load_model and serving may override
            mlflow_model=model,
            # No schema of the inputs: MLflow would refuse all forms of an image but the one that the schema has.
            signature=ModelSignature(outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, embedding_dim))])),
            input_example=_example(size),
        )


def _example(size_px: int) -> pd.DataFrame:
    """Return a table with one image, grey from dark to bright, as a request has it."""
    file = io.BytesIO()
    Image.fromarray(np.tile(np.linspace(0, 255, size_px).astype(np.uint8), (size_px, 1))).convert("RGB").save(
        file, "PNG"
    )
    return pd.DataFrame({"image": [base64.b64encode(file.getvalue()).decode()]})


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Hide MLflow's warnings of a missing schema (it has none for images) and of a missing pip: they would be printed
    into the table of trials."""
    loggers = [logging.getLogger(name) for name in ("mlflow.pyfunc", "mlflow.utils.environment")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def requirements() -> list[str]:
    """Return what to install to load the model, in the versions of this environment (torch without ``+cu130``)."""
    return [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in REQUIREMENTS]


def resolve_checkpoint(target: str, uri: str, destination: Path | None = None) -> Path:
    """Return a folder on this machine with the exported model of a run or a model version.

    target: ``runs:/RUN_ID``, ``models:/NAME/VERSION`` or ``models:/NAME@ALIAS``; or ``runs:/RUN_ID/PATH`` for another
    artifact of the run (a checkpoint, say), which is returned as it is. destination: an existing folder to download
    to; without one it is a temporary folder, or the store's own folder if that is on this machine.
    Raises TrackingError.
    """
    client = connect(uri)
    to = None if destination is None else str(destination)
    run_id, _, path = target.removeprefix("runs:/").partition("/")
    with _looking_up(target, uri):
        if target.startswith("runs:/") and path not in ("", MODEL):
            return Path(client.download_artifacts(run_id, path, to))
        fetched = mlflow.artifacts.download_artifacts(
            artifact_uri=_location(client, target), tracking_uri=uri, dst_path=to
        )
    inside = Model.load(fetched).flavors.get("python_function", {}).get("artifacts", {}).get(MODEL)
    if inside is None:
        raise TrackingError(f"{target} is a model that raydml has not stored. Cure: name one of a study's winner")
    return Path(fetched) / str(inside["path"])


def origin_of(target: str, uri: str) -> Origin:
    """Return the run that a target of :func:`resolve_checkpoint` comes from. Raises TrackingError."""
    client = connect(uri)
    with _looking_up(target, uri):
        if target.startswith("runs:/"):
            run_id = target.removeprefix("runs:/").partition("/")[0]
        else:
            run_id = client.get_model_version(*_version(client, target)).run_id or ""
        tags = client.get_run(run_id).data.tags if run_id else {}
    return Origin(uri, run_id, tags.get("raydml.study", ""), tags.get("raydml.study_id", ""))


def log_test_read(origin: Origin, event: Event) -> None:
    """Record with the run of a fetched model that the test classes are about to be read.

    event: as in the event file, with its ``time``. Raises TrackingError: then nothing may be read.
    """
    if not origin.run_id:
        raise TrackingError(
            f"{event.get('checkpoint')} was registered without a run, so there is none to record the read of the test "
            "classes with. Cure: name the run (runs:/RUN_ID), or export the model and evaluate the folder"
        )
    record = file_of_test_read(event)
    try:
        connect(origin.uri).log_text(origin.run_id, record.text, record.artifact_path)
    except Exception as error:
        if not isinstance(error, (MlflowException, OSError)) and not is_transient(error):
            raise
        said = redacted(str(error).strip().splitlines()[0])[:300]
        raise TrackingError(
            f"the read of the test classes cannot be recorded with run {origin.run_id} in MLflow at "
            f"{redacted(origin.uri)}: {said}. Cure: make that run writable, or export the model and evaluate the folder"
        ) from error


@contextmanager
def _looking_up(target: str, uri: str) -> Iterator[None]:
    try:
        yield
    except (MlflowException, OSError) as error:
        said = redacted(str(error).strip().splitlines()[0])[:300]
        raise TrackingError(
            f"{target}: not found in MLflow at {redacted(uri)}: {said}. Cure: look it up with launch.py ui; a run is "
            "runs:/RUN_ID, a registered model models:/NAME/VERSION or models:/NAME@champion"
        ) from error


def _location(client: MlflowClient, target: str) -> str:
    """Return the address of the model's files."""
    kind, _, rest = target.partition(":/")
    if kind == "runs" and rest:
        run = client.get_run(rest.split("/")[0])
        models = run.outputs.model_outputs if run.outputs else []
        if not models:
            raise TrackingError(
                f"{target}: the run {run.info.run_name!r} holds no model; only the winner of a finished study does. "
                "Cure: evaluate the study itself, or a checkpoint folder of the trial"
            )
        return str(client.get_logged_model(models[-1].model_id).artifact_location)
    return str(client.get_model_version_download_uri(*_version(client, target)))


def _version(client: MlflowClient, target: str) -> tuple[str, str]:
    """Return name and version of a registered model."""
    kind, _, rest = target.partition(":/")
    name, _, version = rest.partition("/")
    if kind != "models" or not name or not (version or "@" in name):
        raise TrackingError(f"{target}: expected runs:/RUN_ID, models:/NAME/VERSION or models:/NAME@ALIAS")
    if not version:
        name, _, alias = name.partition("@")
        version = client.get_model_version_by_alias(name, alias).version
    return name, str(version)
