"""Ray's job server over HTTP, where it is absent, refuses the token, is something else, or says what is wrong."""

import http.server
import json
import socket
import threading
import time
from contextlib import contextmanager

import pytest

from raydml.study import job_server
from raydml.study.job_server import JobServer, JobServerAway, JobServerError, is_job_address, read_token


@contextmanager
def serving(answer):
    """A server on the loopback interface. answer: maps method, path and headers to a status and a body."""
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def handle_one(self):
            length = int(self.headers.get("Content-Length") or 0)
            seen.append((self.command, self.path, dict(self.headers), self.rfile.read(length)))
            status, body = answer(self.command, self.path, self.headers)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            if status == 302:
                self.send_header("Location", "/elsewhere")
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_PUT = do_POST = handle_one

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


class StandIn:
    """The answers of a job server: its jobs, and the archives it has. statuses: of a new job, one for each look."""

    def __init__(self, statuses=("RUNNING",), log="", code=None):
        self.jobs, self.packages, self.statuses, self.log, self.code = [], set(), list(statuses), log, code
        self.version = "2.60.0"

    def __call__(self, method, path, _headers):
        if path == "/api/version":
            return 200, json.dumps({"ray_version": self.version}).encode()
        if path.startswith("/api/packages"):
            if method == "PUT":
                self.packages.add(path)
            return (200 if path in self.packages else 404), b""
        if path.endswith("/logs"):
            return 200, json.dumps({"logs": self.log}).encode()
        if method == "POST":
            return 200, b"{}"
        if path == "/api/jobs/":
            return 200, json.dumps(self.jobs).encode()
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        return 200, json.dumps({"submission_id": "x", "status": status, "driver_exit_code": self.code}).encode()


def refusal(address, token=None):
    began_s = time.monotonic()
    with pytest.raises(JobServerError) as raised:
        JobServer(address, token).check()
    assert time.monotonic() - began_s < 5
    assert "\n" not in str(raised.value)
    assert " Cure: " in str(raised.value)
    return str(raised.value)


def test_where_nothing_answers():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert "does not answer within 4 s. Cure: the address of Ray's job server" in refusal(
            f"http://127.0.0.1:{port}"
        )
    assert "nothing answers there (Connection refused). Cure: " in refusal(f"http://127.0.0.1:{port}")
    assert "nothing answers there (Name or service not known)" in refusal("http://no-such-host.invalid:8265")


@pytest.mark.parametrize(
    "answer", [(200, b"<html>a page</html>"), (404, b"nothing here"), (200, b"[]"), (500, b"x"), (302, b"")]
)
def test_a_server_that_is_not_rays(answer):
    version = b'{"ray_version": "2.60.0"}'  # of a server that the token is not for
    with serving(lambda _method, path, _headers: (200, version) if path == "/elsewhere" else answer) as (address, _):
        assert "what answers there is not Ray's job server. Cure: http://HEAD:8265" in refusal(address)


def test_a_token_that_is_missing_or_wrong_and_no_secret_in_the_message(monkeypatch, tmp_path):
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login somebody password netrc-secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))

    def answer(_method, _path, headers):
        sent = headers.get("Authorization", "")
        return (401, b"Unauthorized") if not sent else (403, b"Forbidden")

    with serving(answer) as (address, seen):
        assert "demands a token, and this command has none. Cure: RAY_AUTH_MODE=token" in refusal(address)
        said = refusal(address.replace("http://", "http://me:pass@"), "wrong-token")
    assert "refuses the token of this command. Cure: RAY_AUTH_MODE=token" in said
    assert "pass@" not in said
    assert "wrong-token" not in said
    assert [headers.get("Authorization") for _, _, headers, _ in seen] == [None, "Bearer wrong-token"]


def test_a_refused_request_has_the_last_line_of_what_ray_says():
    def answer(_method, path, _headers):
        return (
            (200, b'{"ray_version": "2.60.0"}')
            if path == "/api/version"
            else (500, b"Traceback\nValueError: no head\n")
        )

    with serving(answer) as (address, _):
        assert "refuses GET /api/packages/gcs/_ray_pkg_none.zip (500: ValueError: no head)" in refusal(address)


def test_a_job_is_sent_found_and_read():
    row = {
        "submission_id": "x-1", "status": "FAILED", "entrypoint": "python launch.py", "message": "why",
        "runtime_env": {"working_dir": "gcs://_ray_pkg_a.zip"}, "metadata": {"a": "b"}, "driver_exit_code": 2,
    }  # fmt: skip
    driver = {"job_id": "01000000", "submission_id": None, "status": "RUNNING"}

    def answer(_method, path, _headers):
        if path.startswith("/api/packages"):
            return 404, b"no"
        return 200, json.dumps(
            {"/api/jobs/": [driver, row], "/api/jobs/x-1/logs": {"logs": "hello"}}.get(path, row)
        ).encode()

    with serving(answer) as (address, seen):
        server = JobServer(address + "/", "t")
        assert not server.has_package("_ray_pkg_a.zip")
        server.submit("x-1", "python launch.py", "_ray_pkg_a.zip", {"A": "1"}, {"a": "b"})
        assert json.loads(seen[-1][3]) == {
            "entrypoint": "python launch.py", "submission_id": "x-1", "metadata": {"a": "b"},
            "runtime_env": {"working_dir": "gcs://_ray_pkg_a.zip", "env_vars": {"A": "1"}},
        }  # fmt: skip
        [job] = server.jobs()
        assert job == server.job("x-1")
        assert (job.package, job.exit_code, job.has_ended, job.metadata) == ("_ray_pkg_a.zip", 2, True, {"a": "b"})
        assert server.log("x-1") == "hello"
    with pytest.raises(JobServerAway):
        server.job("x-1")


def test_a_head_that_starts_takes_the_job_a_little_later(monkeypatch):
    answers = [(500, b"No available agent to submit job, please try again later."), (200, b"{}"), (500, b"x")]
    monkeypatch.setattr(job_server.time, "sleep", lambda _: None)
    with serving(lambda *_: answers.pop(0)) as (address, seen):
        JobServer(address, None).submit("x-1", "python", "_ray_pkg_a.zip", {}, {})
        assert len(seen) == 2
        with pytest.raises(JobServerError, match="500: x"):
            JobServer(address, None).submit("x-2", "python", "_ray_pkg_a.zip", {}, {})


def test_the_token_is_read_where_ray_looks_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(job_server.Path, "home", lambda: tmp_path)
    named, own = tmp_path / "named", tmp_path / ".ray" / "auth_token"
    named.write_text("of the file\n")
    assert read_token({}) is None
    assert read_token({"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "x"}) is None
    assert read_token({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": " x "}) == "x"
    assert read_token({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(named)}) == "of the file"
    with pytest.raises(
        JobServerError, match=r"~/.ray/auth_token cannot be read \(No such file or directory\). Cure: copy"
    ):
        read_token({"RAY_AUTH_MODE": "token"})
    own.parent.mkdir()
    own.write_text("own")
    assert read_token({"RAY_AUTH_MODE": "token"}) == "own"


@pytest.mark.parametrize(
    ("address", "is_one"),
    [("http://head:8265", True), ("https://ray.example.org/x", True), ("http://:8265", False), ("head:8265", False),
     ("http://head:port", False), ("ray://head:10001", False), ("http://", False)],
)  # fmt: skip
def test_addresses_of_job_servers(address, is_one):
    assert is_job_address(address) == is_one
