"""An MLflow server as a team runs it: PostgreSQL, artifacts through the server, logins. By the files of deploy/mlflow.

PostgreSQL and the server run on this machine, listen on the loopback interface, and end with their test.
"""

import base64
import contextlib
import importlib.util
import json
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

FILES = Path(__file__).parents[2] / "deploy" / "mlflow"
PACKAGES = {"psycopg": "psycopg[binary]", "flask_wtf": "mlflow[auth]"}
START_S = 180.0  # longest wait for the server, which makes its tables at the first start
ADMIN = "admin"


class Login(NamedTuple):
    """A user and a password."""

    user: str
    password: str


def programs_of_postgresql() -> Path | None:
    """The folder of initdb and postgres: on PATH, or where Debian has them; None if they are not installed."""
    found = shutil.which("initdb")
    if found is not None:
        return Path(found).parent
    return next((path.parent for path in sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), reverse=True)), None)


def what_is_missing() -> str:
    """Why no such server can be started here; empty if it can."""
    packages = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if packages:
        return f"{', '.join(packages)}: not installed (the extra `cluster`)"
    return "" if programs_of_postgresql() else "PostgreSQL is not installed (Debian: postgresql)"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def postgresql() -> Iterator[tuple[int, str]]:
    """Run PostgreSQL with the databases of the server, and yield its port and the password of the role mlflow.

    It refuses to run as root: then it runs as an unprivileged user of this machine.
    """
    import psycopg

    programs = programs_of_postgresql()
    assert programs is not None
    folder, port, password = Path(tempfile.mkdtemp(prefix="raydml-postgresql-")), free_port(), secrets.token_hex(16)
    (folder / "password").write_text(password)
    (folder / "password").chmod(0o600)
    as_user: dict[str, object] = {"cwd": "/"}
    if os.geteuid() == 0:
        account = pwd.getpwnam("nobody")
        as_user |= {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
        for path in (folder, folder / "password"):
            os.chown(path, account.pw_uid, account.pw_gid)
    process = None
    try:
        with open(folder / "log.txt", "wb") as log:
            subprocess.run(
                [programs / "initdb", "--pgdata", folder / "data", "--username", "mlflow", "--auth", "scram-sha-256",
                 "--pwfile", folder / "password", "--encoding", "UTF8", "--locale", "C", "--no-sync"],
                stdout=log, stderr=log, timeout=120, check=True, **as_user,
            )  # type: ignore[call-overload]  # fmt: skip
            process = subprocess.Popen(
                [programs / "postgres", "-D", folder / "data", "-p", str(port), "-c", "listen_addresses=127.0.0.1",
                 "-c", "unix_socket_directories="],
                stdout=log, stderr=log, start_new_session=True, **as_user,
            )  # type: ignore[call-overload]  # fmt: skip
        deadline, said = time.monotonic() + 60, (folder / "log.txt")
        while True:
            try:
                connection = psycopg.connect(
                    f"postgresql://mlflow@127.0.0.1:{port}/postgres", password=password, autocommit=True
                )
                break
            except psycopg.OperationalError:
                assert process.poll() is None, said.read_text()
                assert time.monotonic() < deadline, said.read_text()
                time.sleep(0.1)
        with connection:
            for database in ("mlflow", "mlflow_auth"):
                connection.execute(f"create database {database}")
        yield port, password
    finally:
        if process is not None:
            process.send_signal(signal.SIGINT)  # it ends its connections, and waits for nobody
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def settings_of(file: Path) -> dict[str, str]:
    """The variables of a file that systemd reads."""
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def words_of_service() -> list[str]:
    """What the service runs, behind its program."""
    lines = (FILES / "mlflow.service").read_text(encoding="utf-8").splitlines()
    (command,) = [line.removeprefix("ExecStart=") for line in lines if line.startswith("ExecStart=")]
    program, *words = command.split()
    assert Path(program).name == "mlflow"
    return words


class TeamServer:
    """The server: ``start()`` and ``stop()`` by turns, on one address and the same databases."""

    def __init__(
        self, folder: Path, database: tuple[int, str], artifacts: str = "", extra: Mapping[str, str] | None = None
    ) -> None:
        port, password = self.database = database
        self.folder, self.port, self.admin = folder, free_port(), Login(ADMIN, secrets.token_hex(12))
        self.uri, self.process = f"http://127.0.0.1:{self.port}", None
        settings = settings_of(FILES / "mlflow.env")
        (folder / "basic_auth.ini").write_text((FILES / "basic_auth.ini").read_text().replace("5432", str(port)))
        self.secrets = {
            "PGPASSWORD": password,
            "MLFLOW_AUTH_ADMIN_PASSWORD": self.admin.password,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),
        }
        filled = {
            **self.secrets,
            "MLFLOW_PORT": str(self.port),
            "MLFLOW_WORKERS": "1",
            "MLFLOW_SERVER_ALLOWED_HOSTS": f"127.0.0.1:{self.port},mlflow:5000",
            "MLFLOW_BACKEND_STORE_URI": settings["MLFLOW_BACKEND_STORE_URI"].replace("5432", str(port)),
            "MLFLOW_ARTIFACTS_DESTINATION": artifacts or str(folder / "artifacts"),
            "MLFLOW_AUTH_CONFIG_PATH": str(folder / "basic_auth.ini"),
            **(extra or {}),
        }
        self.environment = {**os.environ, **settings, **filled}
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
            self.environment.pop(name, None)

    @property
    def log(self) -> str:
        return (self.folder / "server.txt").read_text(errors="replace")

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", *words_of_service()]
        with open(self.folder / "server.txt", "ab") as log:
            self.process = subprocess.Popen(
                command, env=self.environment, cwd=self.folder, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log[-3000:]
            with contextlib.suppress(OSError):
                if urllib.request.urlopen(f"{self.uri}/health", timeout=2).status == 200:
                    return
            time.sleep(0.3)
        raise AssertionError(f"the server does not answer:\n{self.log[-3000:]}")

    def stop(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # the group is its own
            self.process.wait(30)
            self.process = None

    def request(
        self, path: str, login: Login | None, body: object = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, str]:
        """Send a request, and return the status and the text of the answer."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.uri}{path}", data, {"Content-Type": "application/json"})
        for name, value in (headers or {}).items():
            request.add_header(name, value)
        if login is not None:
            words = base64.b64encode(f"{login.user}:{login.password}".encode()).decode()
            request.add_header("Authorization", f"Basic {words}")
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, answer.read().decode(errors="replace")
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode(errors="replace")

    def add_user(self, user: str) -> Login:
        """Make an account, as the admin."""
        login = Login(user, secrets.token_hex(12))
        body = {"username": login.user, "password": login.password}
        status, text = self.request("/api/2.0/mlflow/users/create", self.admin, body)
        assert status == 200, text
        return login


@contextlib.contextmanager
def team_server(folder: Path, artifacts: str = "", extra: Mapping[str, str] | None = None) -> Iterator[TeamServer]:
    """Run PostgreSQL and the server, both with new databases."""
    with postgresql() as database:
        server = TeamServer(folder, database, artifacts, extra)
        try:
            server.start()
            yield server
        finally:
            server.stop()
