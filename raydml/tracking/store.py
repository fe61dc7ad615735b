"""Access to an MLflow store: the default one, whether a store can be used, and which of its errors are transient."""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path

import requests
import sqlalchemy.exc
from mlflow import MlflowClient
from mlflow.environment_variables import (
    MLFLOW_DISABLE_TELEMETRY,
    MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR,
    MLFLOW_HTTP_REQUEST_MAX_RETRIES,
    MLFLOW_HTTP_REQUEST_TIMEOUT,
    MLFLOW_UV_AUTO_DETECT,
)
from mlflow.exceptions import MlflowException

#: Defaults for MLflow's own environment variables; what the user has set stays.
MLFLOW_DEFAULTS = {
    # MLflow's 7 retries block for four minutes when a server is down. The tracker retries by itself.
    MLFLOW_HTTP_REQUEST_MAX_RETRIES: 1,
    MLFLOW_HTTP_REQUEST_TIMEOUT: 30,
    # It would draw over the table of trials.
    MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR: "false",
    # Read before each report; cli.prepare_environment prevents the report at `import mlflow` itself.
    MLFLOW_DISABLE_TELEMETRY: "true",
    # MLflow would copy uv.lock, with the addresses of registries, and pyproject.toml from the working directory into
    # each model, and print that into the table of trials. A model lists its own requirements.
    MLFLOW_UV_AUTO_DETECT: "false",
}
EXPERIMENT = "raydml"
#: Columns of the UI's table of runs at :func:`runs_page`; MLflow stores such a view as a tag of the experiment.
VIEW_TAG = f"mlflow.sharedViewState.{EXPERIMENT}"
VIEW_COLUMNS = (
    "attributes.`Duration`",
    "metrics.`epoch`",
    "metrics.`val_map_at_r`",
    "metrics.`val_recall_at_1`",
    "params.`loss.name`",
    "tags.`raydml.stage`",
    "tags.`raydml.fold`",
    "tags.`raydml.ended`",
)
SCHEMES = ("sqlite", "http", "https", "postgresql", "mysql", "mssql", "databricks")
#: Errors of a server that starts, stops, is overloaded or refuses the credentials: a later attempt may succeed.
TRANSIENT_CODES = frozenset(
    {
        "INTERNAL_ERROR",
        "TEMPORARILY_UNAVAILABLE",
        "REQUEST_LIMIT_EXCEEDED",
        "DEADLINE_EXCEEDED",
        "CANCELLED",
        "ABORTED",
        "UNAUTHENTICATED",
        "PERMISSION_DENIED",
    }
)


class TrackingError(ValueError):
    """An MLflow store cannot be used as given; the message says the cure."""


def default_uri(storage: Path) -> str:
    """Return the address of the embedded store: an SQLite file in the storage folder, with its absolute path."""
    return f"sqlite:///{Path(storage).resolve() / 'mlflow.db'}"


def redacted(text: str) -> str:
    """Return the text without the ``user:password@`` of any address in it."""
    return re.sub(r"(\w://)[^/@\s]+@", r"\1***@", text)


def connect(uri: str) -> MlflowClient:
    """Return a client for one store. MLflow's global tracking address is neither read nor set."""
    for variable, value in MLFLOW_DEFAULTS.items():
        if not variable.is_set():
            variable.set(value)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # it reports every table that it creates
    logging.getLogger("alembic").setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def prepare_store(uri: str, storage: str | Path | None = None) -> str:
    """Connect to the store, create the experiment where it is missing, and return the experiment's id.

    Call it in the driver before anything starts: a new database must be created by one process. Raises TrackingError.
    """
    scheme = uri.partition(":")[0].partition("+")[0].lower()
    if scheme not in SCHEMES:
        raise TrackingError(
            f"tracking URI {redacted(uri)!r}: no store of the kind {scheme!r}; MLflow takes {', '.join(SCHEMES)}. "
            "Cure: leave it out for a local database, or give sqlite:////absolute/path/mlflow.db or http://host:5000"
        )
    if scheme == "sqlite":
        _prepare_sqlite(uri)
    try:
        return experiment_id(connect(uri), uri, storage)
    except (MlflowException, requests.RequestException, sqlalchemy.exc.SQLAlchemyError) as error:
        said = redacted(str(error).strip().splitlines()[0])
        raise TrackingError(
            f"MLflow at {redacted(uri)} cannot be used: {said[:300]}. Cure: {_cure(scheme, error)}"
        ) from error


def experiment_id(client: MlflowClient, uri: str, storage: str | Path | None) -> str:
    """Return the id of the experiment of all studies, which is created when missing.

    The artifacts of a server are stored where the server puts them, those of a local database in
    ``<storage>/mlartifacts``.
    """
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        location = None if uri.startswith(("http", "databricks")) or storage is None else _artifacts(storage)
        view = json.dumps({"selectedColumns": VIEW_COLUMNS})
        return str(client.create_experiment(EXPERIMENT, artifact_location=location, tags={VIEW_TAG: view}))
    if experiment.lifecycle_stage != "active":
        raise TrackingError(
            f"the experiment {EXPERIMENT!r} was deleted in MLflow at {redacted(uri)}. Cure: restore it (mlflow "
            f"experiments restore --experiment-id {experiment.experiment_id}), or use another tracking URI"
        )
    return str(experiment.experiment_id)


def runs_page(uri: str) -> str:
    """Return the part behind the address of the UI that opens the table of runs with `VIEW_COLUMNS`.

    Empty if the store does not have that view or does not answer. Creates nothing in the store.
    """
    try:
        found = connect(uri).get_experiment_by_name(EXPERIMENT)
    except Exception as error:
        if not isinstance(error, MlflowException) and not is_transient(error):
            raise
        return ""
    if found is None or found.lifecycle_stage != "active" or VIEW_TAG not in found.tags:
        return ""  # for a view that it does not have, MLflow shows an error
    experiment = found.experiment_id
    return f"/#/experiments/{experiment}/runs?workflowType=machine_learning&viewStateShareKey={EXPERIMENT}"


def _artifacts(storage: str | Path) -> str:
    if "://" in str(storage):
        return f"{str(storage).rstrip('/')}/mlartifacts"
    return (Path(storage).resolve() / "mlartifacts").as_uri()


def _prepare_sqlite(uri: str) -> None:
    path = Path(uri.partition(":///")[2].partition("?")[0])
    if not path.is_absolute():
        raise TrackingError(
            f"tracking URI {uri!r} is relative to the working directory, and every command would open another "
            f"database. Cure: sqlite:///{path.resolve()}"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrackingError(f"tracking URI {uri!r}: the folder cannot be created: {error}") from error
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise TrackingError(f"tracking URI {uri!r} may not be written by this user. Cure: another --tracking-uri")


def _cure(scheme: str, error: Exception) -> str:
    if isinstance(error, MlflowException) and error.error_code in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
        return "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN)"
    if scheme in ("http", "https"):
        return "start the server, correct the address, or leave it out for a local database"
    return "correct the address, repair the database, or leave it out for a local one"


def is_transient(error: Exception) -> bool:
    """Return whether the same request may succeed later: the store was unavailable, busy, or refused the login."""
    if isinstance(error, MlflowException):
        return error.error_code in TRANSIENT_CODES
    return isinstance(error, (requests.RequestException, ConnectionError, TimeoutError, sqlalchemy.exc.SQLAlchemyError))
