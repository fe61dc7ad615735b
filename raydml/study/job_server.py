"""Ray's job server over HTTP: it takes the files of a job, starts a command on the head, and has its log.

Only requests is used: Ray's own client needs Ray in this process, waits without end for a server that does not answer,
and lets RAY_ADDRESS replace the address that it was given.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

import requests

from raydml.ops.addresses import redacted

_ANSWER_S = 4.0  # for the server to take a connection, and to begin its answer
_WORK_S = 120.0  # for the answer to a request that makes the cluster do something
#: Ray's words while the head starts: the process that runs jobs comes after the server. And how long to wait for it.
_NO_AGENT, _AGENT_S = "No available agent", 60.0
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


class JobServerError(ValueError):
    """What the job server refuses, or that it is not there; the message has the cure."""


class JobServerAway(JobServerError):
    """The job server does not answer now."""


class Job(NamedTuple):
    """A job of a cluster. package: the archive of its files. exit_code: of its command; None while there is none."""

    id: str
    status: str
    command: str
    package: str
    metadata: dict[str, str]
    message: str
    exit_code: int | None

    @property
    def has_ended(self) -> bool:
        return self.status in _ENDED


def read_token(environment: Mapping[str, str]) -> str | None:
    """Return the token of the clusters of this user, from where Ray looks for it; None without tokens.

    Raises JobServerError where the file that is named cannot be read.
    """
    if environment.get("RAY_AUTH_MODE", "").lower() != "token":
        return None
    if token := environment.get("RAY_AUTH_TOKEN", "").strip():
        return token
    named = environment.get("RAY_AUTH_TOKEN_PATH")
    try:
        path = Path(named) if named else Path.home() / ".ray" / "auth_token"
        return path.read_text(encoding="utf-8").strip()
    except (OSError, RuntimeError, UnicodeDecodeError) as error:  # RuntimeError: no home
        reason = getattr(error, "strerror", None) or error
        raise JobServerError(
            f"RAY_AUTH_MODE is token, and {named or '~/.ray/auth_token'} cannot be read ({reason}). Cure: copy "
            "~/.ray/auth_token of the cluster's head there, or RAY_AUTH_MODE=disabled for a cluster without tokens"
        ) from error


class JobServer:
    """The job server at an address such as http://HEAD:8265. token: of the cluster, if it has one."""

    def __init__(self, address: str, token: str | None) -> None:
        self.address = address.rstrip("/")
        self._token = token

    @property
    def has_token(self) -> bool:
        return self._token is not None

    def check(self) -> str:
        """Return the version of Ray there. Raises JobServerError, within 5 s, where no job server of Ray answers."""
        answer = self._request("GET", "/api/version")
        try:
            version = str(answer.json()["ray_version"])
        except (ValueError, KeyError, TypeError) as error:
            raise self._no_server_of_ray() from error
        self._request("GET", f"/api/packages/gcs/{quote('_ray_pkg_none.zip')}", missing_ok=True)  # needs the token
        return version

    def has_package(self, name: str) -> bool:
        """Return whether the cluster has an archive, and let it keep it for the next minutes."""
        return self._request("GET", f"/api/packages/gcs/{name}", missing_ok=True).status_code != 404

    def send_package(self, name: str, archive: bytes) -> None:
        """Send an archive to the cluster."""
        self._request("PUT", f"/api/packages/gcs/{name}", wait_s=_WORK_S, data=archive)

    def submit(
        self, job_id: str, command: str, package: str, variables: Mapping[str, str], metadata: Mapping[str, str]
    ) -> None:
        """Start a command in the unpacked archive, with some environment variables."""
        environment = {"working_dir": f"gcs://{package}", "env_vars": dict(variables)}
        request = {"entrypoint": command, "submission_id": job_id, "runtime_env": environment}
        until_s = time.monotonic() + _AGENT_S
        while True:
            try:
                self._request("POST", "/api/jobs/", wait_s=_WORK_S, json={**request, "metadata": dict(metadata)})
                return
            except JobServerError as error:
                if _NO_AGENT not in str(error) or time.monotonic() > until_s:
                    raise
            time.sleep(1.0)

    def job(self, job_id: str) -> Job:
        """Return a job by its id."""
        return _job(self._object("GET", f"/api/jobs/{quote(job_id)}"))

    def jobs(self) -> list[Job]:
        """Return the jobs that were submitted to the cluster since its head began."""
        answer = self._request("GET", "/api/jobs/", wait_s=_WORK_S)
        try:
            return [_job(row) for row in answer.json() if row.get("submission_id")]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._no_server_of_ray() from error

    def log(self, job_id: str) -> str:
        """Return all that a job has printed so far."""
        return str(self._object("GET", f"/api/jobs/{quote(job_id)}/logs")["logs"])

    def _object(self, method: str, path: str) -> dict[str, Any]:
        try:
            answer = self._request(method, path, wait_s=_WORK_S).json()
            return dict(answer)
        except (ValueError, TypeError) as error:
            if isinstance(error, JobServerError):
                raise
            raise self._no_server_of_ray() from error

    def _request(
        self, method: str, path: str, *, wait_s: float = _ANSWER_S, missing_ok: bool = False, **content: Any
    ) -> requests.Response:
        place = f"--address {redacted(self.address)}"
        try:
            answer = requests.request(
                method, self.address + path, timeout=(_ANSWER_S, wait_s), auth=self._sign, allow_redirects=False,
                **content,
            )  # fmt: skip
        except requests.ReadTimeout as error:
            raise JobServerAway(
                f"{place}: what listens there does not answer within {wait_s:g} s. Cure: the address of Ray's job "
                "server, such as http://HEAD:8265"
            ) from error
        except requests.RequestException as error:
            raise JobServerAway(
                f"{place}: nothing answers there ({_reason(error)}). Cure: start the cluster with the extra `cluster` "
                "on its head, or correct the address; the job server listens on the loopback interface of the head: "
                "ssh -L 8265:127.0.0.1:8265 HEAD, then --address http://127.0.0.1:8265"
            ) from error
        if answer.status_code in (401, 403):
            what = "refuses the token of this command" if self._token else "demands a token, and this command has none"
            raise JobServerError(
                f"{place}: the cluster {what}. Cure: RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH with a copy of "
                "~/.ray/auth_token of its head"
            )
        is_fine = answer.status_code == 200 or (missing_ok and answer.status_code == 404)
        if not is_fine and path == "/api/version":
            raise self._no_server_of_ray()
        if not is_fine:
            said = (answer.text.strip().splitlines() or ["without a word"])[-1][:300]
            cure = "look into dashboard.log in the logs of Ray on the head"
            if _NO_AGENT in said:
                cure = "where another Ray on the head has the port, ray start --dashboard-agent-listen-port=PORT there"
            raise JobServerError(
                f"{place}: Ray's job server refuses {method} {path} ({answer.status_code}: {said.rstrip('.')}). "
                f"Cure: {cure}"
            )
        return answer

    def _sign(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """Add the token; without one, keep requests from taking a password for the host out of ~/.netrc."""
        if self._token:
            request.headers["Authorization"] = f"Bearer {self._token}"
        return request

    def _no_server_of_ray(self) -> JobServerError:
        return JobServerError(
            f"--address {redacted(self.address)}: what answers there is not Ray's job server. Cure: http://HEAD:8265, "
            "where `ray start --head` ran with the extra `cluster`"
        )


def is_job_address(address: str) -> bool:
    """Return whether an address is one of HTTP, with a host."""
    try:
        parts = urlsplit(address)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        return False


def _job(row: Mapping[str, Any]) -> Job:
    environment = row.get("runtime_env") or {}
    return Job(
        id=str(row["submission_id"]),
        status=str(row["status"]),
        command=str(row.get("entrypoint") or ""),
        package=str(environment.get("working_dir") or "").rpartition("/")[2],
        metadata={str(name): str(value) for name, value in (row.get("metadata") or {}).items()},
        message=str(row.get("message") or ""),
        exit_code=row.get("driver_exit_code"),
    )


def _reason(error: Exception) -> str:
    found = re.search(r"\[Errno -?\d+\] ([^'\")]+)", str(error))
    if found:
        return found[1].strip()
    return "no connection in time" if isinstance(error, requests.ConnectTimeout) else str(error).splitlines()[0][:200]
