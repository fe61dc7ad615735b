"""Access to an MLflow store: the default one, whether a store can be used, and which of its errors are transient."""

from __future__ import annotations

import json
import logging
import os
import re
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

import filelock
import requests
import sqlalchemy
import sqlalchemy.exc
from mlflow import MlflowClient
from mlflow.environment_variables import (
    MLFLOW_DISABLE_TELEMETRY,
    MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR,
    MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR,
    MLFLOW_HTTP_REQUEST_BACKOFF_JITTER,
    MLFLOW_HTTP_REQUEST_MAX_RETRIES,
    MLFLOW_HTTP_REQUEST_TIMEOUT,
    MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER,
    MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT,
    MLFLOW_TRACKING_USERNAME,
    MLFLOW_UV_AUTO_DETECT,
)
from mlflow.exceptions import MlflowException

from raydml.ops.addresses import redacted

#: Defaults for MLflow's own environment variables; what the user has set stays.
MLFLOW_DEFAULTS = {
    # A model is two hundred requests, and has to get through a server that answers half of them with an error. Between
    # the retries it waits up to half a second; MLflow's own waits add up to four minutes, and a server may ask for
    # more. The delivery has longer waits of its own. See also `without_retries`.
    MLFLOW_HTTP_REQUEST_MAX_RETRIES: 7,
    MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR: 0,
    MLFLOW_HTTP_REQUEST_BACKOFF_JITTER: 0.5,
    MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER: "false",
    MLFLOW_HTTP_REQUEST_TIMEOUT: 30,
    # It would draw over the table of trials.
    MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR: "false",
    # It would, too, with the password of the address.
    MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT: "true",
    # Read before each report; cli.prepare_environment prevents the report at `import mlflow` itself.
    MLFLOW_DISABLE_TELEMETRY: "true",
    # MLflow would copy uv.lock, with the addresses of registries, and pyproject.toml from the working directory into
    # each model, and print that into the table of trials. A model lists its own requirements.
    MLFLOW_UV_AUTO_DETECT: "false",
}
_logger = logging.getLogger(__name__)
EXPERIMENT = "raydml"
#: Columns of the UI's table of runs at :func:`runs_page`; MLflow stores such a view as a tag of the experiment.
VIEW_TAG = f"mlflow.sharedViewState.{EXPERIMENT}"
VIEW_COLUMNS = (
    "attributes.`Duration`",
    "metrics.`best/selected`",
    "metrics.`best/map_at_r`",
    "metrics.`best/recall_at_1`",
    "metrics.`best/epoch`",
    "metrics.`train/epochs`",
    "metrics.`confirmed/map_at_r`",
    "metrics.`test/map_at_r`",
    "tags.`raydml.recipe`",
    "tags.`raydml.configuration`",
    "tags.`raydml.fold`",
    "tags.`raydml.ended`",
)
#: What people read first in the UI.
EXPERIMENT_NOTE = """\
Studies of raydml. Each is one run with its trials below it; its description has the result, its artifacts the report.

Sort by `best/selected`: the validation metric that ranks the trials, at its best epoch. `val/...` are the \
curves, `test/...` the scores on the test classes, `untrained/...` those of the same network before training."""
VIEW = {"selectedColumns": VIEW_COLUMNS, "orderByKey": "metrics.`best/selected`", "orderByAsc": False}
EXPERIMENT_TAGS = {VIEW_TAG: json.dumps(VIEW), "mlflow.note.content": EXPERIMENT_NOTE}
#: Modules that SQLAlchemy imports for the addresses of MLflow's stores, and the packages that have them.
_DRIVERS = {"psycopg": "psycopg[binary]", "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient"}
SCHEMES = ("sqlite", "http", "https", "postgresql", "mysql", "mssql", "databricks")
#: Errors of a server that starts, stops, is overloaded or refuses the credentials: a later attempt may succeed.
TRANSIENT_CODES = frozenset(
    {
        "INTERNAL_ERROR",
        "TEMPORARILY_UNAVAILABLE",
        "REQUEST_LIMIT_EXCEEDED",
        "RESOURCE_EXHAUSTED",
        "DEADLINE_EXCEEDED",
        "CANCELLED",
        "ABORTED",
        "UNAUTHENTICATED",
        "PERMISSION_DENIED",
    }
)

#: What MLflow's client says of an address that is no MLflow server: a page of a website, no address, no TLS.
_NEVER_RIGHT = re.compile(
    "not in a valid JSON format|Failed to parse|[Ii]nvalid url|No host supplied|CERTIFICATE_VERIFY_FAILED"
    "|WRONG_VERSION_NUMBER"
)
#: What SQLite says of a database that can be used later, and other databases of a server that is not there.
_SQLITE_BUSY = re.compile("locked|is full|disk I/O error")
_DATABASE_AWAY = re.compile(
    "could not connect|connection (refused|failed)|Can't connect|timed? ?out|starting up|Network"
)
#: What a server of databases says of a login that it refuses, and of a database that it does not have.
_LOGIN_REFUSED = re.compile("password|authentication|access denied", re.IGNORECASE)
_NO_DATABASE = re.compile("database .* does not exist|[Uu]nknown database")
#: What SQLite says when MLflow makes tables again that it was making when its process was killed.
_CUT_OFF = re.compile("_alembic_tmp_|table .* already exists|duplicate column name")
#: Longest wait for a store at the start of a study, and for the lock of a database, which is held for milliseconds.
START_PATIENCE_S, LOCK_PATIENCE_S = 10.0, 5.0
LOOK_PATIENCE_S = 4.0
#: Names of the embedded store in the storage folder, and of the folder beside a local database for its artifacts.
DATABASE, ARTIFACTS = "mlflow.db", "mlartifacts"
_MAX_DATABASE_PATH = 504  # SQLite has 512, also for the journal that it keeps beside the database
_NO_FOLDER = "sqlite+pysqlite:///"
_PROXIED = "mlflow-artifacts:"  # the beginning of a location behind a server
#: Columns of MLflow's tables with the location of artifacts.
LOCATIONS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


class TrackingError(ValueError):
    """An MLflow store cannot be used as given; the message says the cure."""


class StoreGone(TrackingError):
    """The database of an MLflow store is not where it was; it may come back (a disk that is mounted later)."""


class StoreUnavailable(TrackingError):
    """An MLflow store does not answer now, and may later: a server that is down, a database that is locked."""


def default_uri(storage: Path) -> str:
    """Return the address of the embedded store: an SQLite file in the storage folder, with its absolute path.

    Raises TrackingError for a folder whose name no address can express.
    """
    path = Path(storage).resolve() / DATABASE
    uri = _address_of(path)
    if uri is None:
        raise TrackingError(
            f"--storage {str(storage)!r}: MLflow's database cannot be opened in a folder of this name. "
            "Cure: a --storage without '%' and '?' in its name, or a --tracking-uri elsewhere"
        )
    return uri


def _address_of(path: Path) -> str | None:
    """Return the address that opens an SQLite file, or None if there is none.

    SQLAlchemy decodes %41 and ends a path at a question mark; MLflow, which makes the folder of sqlite:///, does not
    decode. The second form is the same database for SQLAlchemy, and MLflow makes no folder for it.
    """
    encoded = str(path).replace("%", "%25").replace("?", "%3F")
    return next((uri for uri in (f"sqlite:///{path}", f"{_NO_FOLDER}{encoded}") if database_path(uri) == path), None)


def database_path(uri: str) -> Path | None:
    """Return the file of an SQLite store, as SQLAlchemy opens it; None for another store."""
    if not uri.startswith(("sqlite:", "sqlite+")):
        return None
    try:
        return Path(sqlalchemy.make_url(uri).database or "")
    except (sqlalchemy.exc.ArgumentError, ValueError) as error:
        raise TrackingError(
            f"tracking URI {uri!r} is no address: {error}. Cure: sqlite:////absolute/path/{DATABASE}"
        ) from error


def study_store(recorded: str | None, storage: Path, chosen: str | None = None) -> str:
    """Return the address of the store that a study reports to.

    chosen: the one that the command names; it wins. recorded: the one in study.json, None for the embedded store, which
    is in the storage folder wherever that is now. Raises StoreGone if the recorded database does not exist any more.
    """
    if chosen:
        return _as_meant(chosen)
    if recorded is None:
        return default_uri(storage)
    path = database_path(recorded)
    if path is not None and not path.exists():
        raise StoreGone(
            f"the study reports to the MLflow store {path}, which does not exist any more. Cure: put it back, or name "
            f"the store that takes its place: --tracking-uri URI ({default_uri(storage)} is one beside the study)"
        )
    return recorded


def _as_meant(uri: str) -> str:
    """Return the address of the file that a user means by sqlite:///PATH.

    In an address %41 is the letter A. A user types the path as it is: where a folder of that very name exists, it is
    the one that is meant.
    """
    written = Path(uri.removeprefix("sqlite:///"))
    if not uri.startswith("sqlite:///") or not written.is_absolute() or database_path(uri) == written:
        return uri
    return _address_of(written) or uri if written.parent.is_dir() else uri.replace("sqlite:///", _NO_FOLDER, 1)


def login_of(uri: str) -> str:
    """Return the user whose login MLflow's client sends to a server; empty without one, and for other stores."""
    if not uri.startswith(("http://", "https://")):
        return ""
    return unquote(urlsplit(uri).username or "") or MLFLOW_TRACKING_USERNAME.get() or ""


def require_store(uri: str, cure: str) -> None:
    """Raise StoreGone if the store is a database file that does not exist: MLflow would make an empty one."""
    path = database_path(uri)
    if path is not None and not path.exists():
        raise StoreGone(f"there is no MLflow store {path}. Cure: {cure}")


def connect(uri: str) -> MlflowClient:
    """Return a client for one store. MLflow's global tracking address is neither read nor set.

    Creates nothing: raises StoreGone if the database does not exist. Artifacts that were moved with it are found.
    """
    require_store(uri, "run a study first, or name the right --tracking-uri or --storage")
    path = database_path(uri)
    if path is not None:
        _refuse_locked(uri, path)
        _follow_artifacts(path)
    elif not uri.startswith(("http", "databricks")):
        _refuse_unreachable(uri)
    return _client(uri)


def _client(uri: str) -> MlflowClient:
    for variable, value in MLFLOW_DEFAULTS.items():
        if not variable.is_set():
            variable.set(value)
    _quieten()
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _quieten() -> None:
    # It reports every table that it creates, and prints the traceback of every error, which the caller gets as well.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # it warns of every request that it repeats
    logging.getLogger("alembic").setLevel(logging.WARNING)


@contextmanager
def without_retries() -> Iterator[None]:
    """Let MLflow's client send each request once: for what is created twice if only the answer is lost."""
    before = MLFLOW_HTTP_REQUEST_MAX_RETRIES.get_raw()
    MLFLOW_HTTP_REQUEST_MAX_RETRIES.set(0)
    try:
        yield
    finally:
        if before is None:
            MLFLOW_HTTP_REQUEST_MAX_RETRIES.unset()
        else:
            MLFLOW_HTTP_REQUEST_MAX_RETRIES.set(before)


def reach_store(uri: str, storage: str | Path, patience_s: float = START_PATIENCE_S) -> str:
    """Prepare the store, and return why it cannot be used yet; empty if it can.

    patience_s: how long to wait for a server. A study does not wait for a store that may answer later. Raises
    TrackingError where waiting does not help: the address cannot be right, or the store refuses the login.
    """
    errors: list[Exception] = []

    def prepare() -> None:
        try:
            prepare_store(uri, storage)
        except Exception as error:  # raised below
            errors.append(error)

    thread = threading.Thread(target=prepare, name="mlflow-start", daemon=True)
    thread.start()
    # A new database takes as long as it takes; a locked one is refused at once.
    thread.join(patience_s if database_path(uri) is None else None)
    if thread.is_alive():
        return f"MLflow at {redacted(uri)} has not answered within {patience_s:g} s"
    for error in errors:
        if not isinstance(error, StoreUnavailable):
            raise error
    return str(errors[0]) if errors else ""


def look_at_store(uri: str, patience_s: float = LOOK_PATIENCE_S) -> None:
    """Raise TrackingError where a store cannot be used, at the latest after patience_s; nothing is created."""
    answers: list[Exception | None] = []

    def ask() -> None:
        try:
            with without_retries():
                connect(uri).search_experiments(max_results=1)
            answers.append(None)
        except Exception as error:  # raised below
            answers.append(error)

    thread = threading.Thread(target=ask, name="mlflow-look", daemon=True)
    thread.start()
    thread.join(patience_s)
    error = answers[0] if answers else TimeoutError(f"no answer within {patience_s:g} s")
    if error is not None and not isinstance(error, TrackingError):
        scheme = uri.partition(":")[0].partition("+")[0].lower()
        kind = StoreUnavailable if not answers or _may_answer_later(error) else TrackingError
        said = f"MLflow at {redacted(uri)} cannot be used: {first_line(error)}"
        raise kind(f"{said}. Cure: {_cure(uri, scheme, error)}") from error
    if error is not None:
        raise error


def prepare_store(uri: str, storage: str | Path | None = None) -> str:
    """Connect to the store, create the experiment where it is missing, and return the experiment's id.

    Call it in the driver before anything starts: a new database must be created by one process. A database that does
    not exist is created if its folder exists; the storage folder of the embedded store is created too. Raises
    TrackingError.
    """
    scheme = uri.partition(":")[0].partition("+")[0].lower()
    if scheme not in SCHEMES:
        raise TrackingError(
            f"tracking URI {redacted(uri)!r}: no store of the kind {scheme!r}; MLflow takes {', '.join(SCHEMES)}. "
            "Cure: leave it out for a local database, or give sqlite:////absolute/path/mlflow.db or http://host:5000"
        )
    if scheme in ("http", "https") and not urlsplit(uri).netloc:
        raise TrackingError(f"tracking URI {redacted(uri)!r} names no host. Cure: such as http://host:5000")
    path = database_path(uri)
    if path is not None:
        _prepare_folder(uri, path, storage)
    try:
        if path is not None and not path.exists():
            _create_database(path)
        return experiment_id(connect(uri), uri, storage)
    except (MlflowException, requests.RequestException, sqlalchemy.exc.SQLAlchemyError, ImportError) as error:
        said = first_line(error)
        kind = StoreUnavailable if _may_answer_later(error) else TrackingError
        raise kind(f"MLflow at {redacted(uri)} cannot be used: {said}. Cure: {_cure(uri, scheme, error)}") from error


def _create_database(path: Path) -> None:
    """Create MLflow's tables in a file of another name, and rename it: MLflow cannot use a database that was cut off.

    It takes seconds. Of several processes that start at once, one does it, and the others wait for it.
    """
    from mlflow.store.db.utils import _initialize_tables, create_sqlalchemy_engine

    new = path.with_name(f"{path.name}.new")
    address = _address_of(new)
    assert address is not None, "the path of the store has an address, and this one adds letters only"
    _quieten()
    with filelock.FileLock(f"{path}.lock"):
        if path.exists():
            return
        for file in (new, new.with_name(f"{new.name}-journal")):  # of a process that was killed
            file.unlink(missing_ok=True)
        engine = create_sqlalchemy_engine(address)
        try:
            _initialize_tables(engine)
        finally:
            engine.dispose()
        os.replace(new, path)


def create_missing(uri: str, storage: Path) -> None:
    """Create the database of a study that has events if it does not exist, and warn: its former runs are not in it.

    Where it cannot be created yet (the disk is full), a later `sync` does it.
    """
    path = database_path(uri)
    if path is None or path.exists():
        return
    try:
        prepare_store(uri, storage)
    except StoreUnavailable as error:
        _logger.warning("%s", error)
        return
    _logger.warning("there was no MLflow store %s: it is new, and is filled with the study's events", path)


def experiment_id(client: MlflowClient, uri: str, storage: str | Path | None) -> str:
    """Return the id of the experiment of all studies, which is created when missing.

    The artifacts of a server are stored where the server puts them, those of an SQLite file beside it in
    ``mlartifacts``, those of another database in ``<storage>/mlartifacts``. Raises TrackingError for an experiment that
    was deleted, and for the database of a server through which the artifacts go: nothing could be stored there.
    """
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        path = database_path(uri)
        folder = storage if path is None else path.parent
        location = None if uri.startswith(("http", "databricks")) or folder is None else _artifacts(folder)
        try:
            return str(client.create_experiment(EXPERIMENT, artifact_location=location, tags=EXPERIMENT_TAGS))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            return experiment_id(client, uri, storage)  # another study has created it since
    if experiment.lifecycle_stage != "active":
        raise TrackingError(
            f"the experiment {EXPERIMENT!r} was deleted in MLflow at {redacted(uri)}. Cure: restore it (mlflow "
            f"experiments restore --experiment-id {experiment.experiment_id}), or use another tracking URI"
        )
    if (experiment.artifact_location or "").startswith(_PROXIED) and not uri.startswith(("http", "databricks")):
        raise TrackingError(
            f"tracking URI {redacted(uri)}: the artifacts of its experiment {EXPERIMENT!r} are at "
            f"{experiment.artifact_location}, which only the MLflow server of this database can write. Cure: "
            "--tracking-uri http://HOST:PORT, the address of that server"
        )
    for tag, value in EXPERIMENT_TAGS.items():
        if experiment.tags.get(tag) != value:  # made by an older version
            client.set_experiment_tag(experiment.experiment_id, tag, value)
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


def _artifacts(folder: str | Path) -> str:
    if "://" in str(folder):
        return f"{str(folder).rstrip('/')}/{ARTIFACTS}"
    return (Path(folder).resolve() / ARTIFACTS).as_uri()


def _prepare_folder(uri: str, path: Path, storage: str | Path | None) -> None:
    if not path.is_absolute():
        raise TrackingError(
            f"tracking URI {uri!r} is relative to the working directory, and every command would open another "
            f"database. Cure: sqlite:///{path.resolve()}"
        )
    if (num_bytes := len(os.fsencode(path))) > _MAX_DATABASE_PATH:
        raise TrackingError(
            f"tracking URI {uri!r}: SQLite opens a database by a path of at most {_MAX_DATABASE_PATH} bytes, and this "
            f"one has {num_bytes}. Cure: a --storage with a shorter path, or a --tracking-uri elsewhere"
        )
    try:
        if storage is not None and path.parent == Path(storage).resolve():
            path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrackingError(f"--storage {str(storage)!r}: the folder cannot be created: {error}") from error
    if not path.parent.is_dir():
        raise TrackingError(
            f"tracking URI {uri!r}: there is no folder {path.parent}. Cure: correct the address, or make the folder "
            "first (mkdir -p)"
        )
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise TrackingError(f"tracking URI {uri!r} may not be written by this user. Cure: another --tracking-uri")


def _refuse_locked(uri: str, database: Path) -> None:
    """Raise StoreUnavailable if another process keeps a database locked: MLflow would try for minutes."""
    if not os.access(database, os.W_OK):
        return
    try:
        with closing(_open(database, timeout_s=LOCK_PATIENCE_S)) as connection:
            connection.execute("begin immediate")
            connection.rollback()
    except sqlite3.DatabaseError as error:
        if _SQLITE_BUSY.search(str(error)):
            raise StoreUnavailable(
                f"MLflow at {redacted(uri)} cannot be used: {error}. Cure: end the process that holds the database, or "
                "make room on its disk"
            ) from error
        # No database, or a damaged one: MLflow says so when it opens it.


def _refuse_unreachable(uri: str) -> None:
    """Raise SQLAlchemy's error if a database server refuses a connection: MLflow would try again for 100 s."""
    engine = sqlalchemy.create_engine(uri)
    try:
        engine.connect().close()
    finally:
        engine.dispose()


def _follow_artifacts(database: Path) -> None:
    """Correct the locations of the artifacts in a database that was copied or moved together with them.

    MLflow stores absolute locations. In a copy they would name the original, where nothing may be written, and after a
    move nothing at all. They are changed if the artifacts are beside the database, or if they are not where the
    locations say, or if the database from which this one was copied is there. What remains unchanged is a database
    whose artifacts have always been elsewhere.
    """
    if not os.access(database, os.W_OK):
        return
    new = database.resolve().parent / ARTIFACTS
    with closing(_open(database)) as connection, connection:
        created, location = _experiment(connection)
        old = Path(unquote(urlsplit(location).path))
        if not location.startswith("file:") or old.name != ARTIFACTS or old == new:
            return
        original = old.parent / database.name
        copied = _is_copy_of(original, created)
        if not (new.is_dir() or copied or not old.exists()):
            return
        was, now = location.rstrip("/"), new.as_uri()
        for table, column in LOCATIONS:
            connection.execute(
                f"update {table} set {column} = ? || substr({column}, ?) "
                f"where {column} = ? or substr({column}, 1, ?) = ?",
                (now, len(was) + 1, was, len(was) + 1, f"{was}/"),
            )


def _is_copy_of(original: Path, created: int) -> bool:
    """Return whether a database, if it is there and may be read, has the experiment that was created at a time."""
    try:
        if not original.exists():
            return False
        with closing(_open(original, "ro")) as source:
            return _experiment(source)[0] == created
    except (OSError, sqlite3.Error):  # another user's, whose store this one cannot be
        return False


def _open(database: Path, mode: str = "rw", timeout_s: float = 20.0) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{quote(str(database))}?mode={mode}", uri=True, timeout=timeout_s)


def _experiment(connection: sqlite3.Connection) -> tuple[int, str]:
    """Return the time at which the experiment was created, and the location of its artifacts; 0 and "" without one."""
    try:
        row = connection.execute(
            "select creation_time, artifact_location from experiments where name = ?", (EXPERIMENT,)
        ).fetchone()
    except sqlite3.DatabaseError:  # no database of MLflow, or a damaged one: MLflow says so when it opens it
        return 0, ""
    return (int(row[0] or 0), str(row[1] or "")) if row else (0, "")


def _cure(uri: str, scheme: str, error: Exception) -> str:
    if "Invalid Host header" in str(error):
        host = urlsplit(uri).netloc.rpartition("@")[2]
        return (
            f"the server does not accept this host name, whatever the password; start it with --allowed-hosts {host} "
            f"(or MLFLOW_SERVER_ALLOWED_HOSTS={host}), or use its IP address"
        )
    if isinstance(error, MlflowException) and error.error_code in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
        return (
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN); a study does not "
            "store the password of an address"
        )
    if isinstance(error, ImportError):
        package = _DRIVERS.get(error.name or "", error.name)
        return f"install the driver of this database (pip install '{package}'), or take another address"
    if _LOGIN_REFUSED.search(str(error)):
        return "give the whole address with --tracking-uri, or in MLFLOW_TRACKING_URI; a study does not store passwords"
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return "name the server's certificate: MLFLOW_TRACKING_SERVER_CERT_PATH=FILE"
    if "WRONG_VERSION_NUMBER" in str(error):
        return "http:// instead of https://: the server does not speak TLS"
    if scheme in ("http", "https"):
        return "start the server, correct the address, or leave it out for a local database"
    if scheme == "sqlite" and _CUT_OFF.search(str(error)):
        return (
            f"its creation or its upgrade was cut off; delete {database_path(uri)} or put it back from a backup, and "
            "`launch.py sync STUDY` fills it again"
        )
    return "correct the address, repair the database, or leave it out for a local one"


def _may_answer_later(error: Exception) -> bool:
    """Return whether a store may be usable later without a change of its address, its login or its settings."""
    if isinstance(error, MlflowException):
        refuses_login = error.error_code in ("UNAUTHENTICATED", "PERMISSION_DENIED")
        return error.error_code in TRANSIENT_CODES and not refuses_login and not _NEVER_RIGHT.search(str(error))
    if isinstance(error, sqlalchemy.exc.OperationalError):
        away = _SQLITE_BUSY.search(str(error)) or _DATABASE_AWAY.search(str(error))
        return bool(away) and not _LOGIN_REFUSED.search(str(error)) and not _NO_DATABASE.search(str(error))
    return isinstance(error, requests.RequestException)


def is_transient(error: Exception) -> bool:
    """Return whether the same request may succeed later: the store was unavailable, busy, or refused the login."""
    if isinstance(error, MlflowException):
        return error.error_code in TRANSIENT_CODES
    kinds = (StoreGone, StoreUnavailable, requests.RequestException, ConnectionError, TimeoutError)
    return isinstance(error, (*kinds, sqlalchemy.exc.SQLAlchemyError, sqlite3.OperationalError))


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, without passwords, in at most 300 characters.

    Of a request that failed in the network only the cause: "[Errno 111] Connection refused".
    """
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if (cause := re.search(r"\(Caused by \w+\((.*)\)\)", line)) is not None:
        line = re.sub("[\"'()]", "", cause.group(1).rpartition(": ")[2])
    return redacted(line)[:300]
