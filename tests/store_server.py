"""A real server of S3's protocol in this process, which can also fail, stall, cut off and damage what it sends."""

import threading
import time
import urllib.request
from contextlib import contextmanager

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "someone",
    "AWS_SECRET_ACCESS_KEY": "a secret",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


class StoreServer:
    """A server with a bucket ``bucket``. requests: method and path of each, in order.

    faults: functions that are called with method and path; each returns None, or what happens to the request: a number
    of seconds to stall, ``"error"`` for a 500, or ``"cut"``, which sends half of the answer.
    """

    def __init__(self):
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self.requests, self.faults = [], []
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread.start()
        for method, path in (("POST", "moto-api/reset"), ("PUT", "bucket")):
            urllib.request.urlopen(urllib.request.Request(f"{self.endpoint}/{path}", method=method), timeout=10)
        self.requests.clear()

    def uri(self, prefix="studies"):
        return f"s3://bucket/{prefix}?endpoint_override={self.endpoint}"

    def close(self):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)

    def _answer(self, environ, start_response):
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.requests.append((method, path))
        for fault in self.faults:
            effect = fault(method, path)
            if effect == "error":
                start_response("500 Internal Server Error", [("Content-Length", "0")])
                return [b""]
            if effect == "cut":
                body = b"".join(self._app(environ, start_response))
                return [body[: len(body) // 2]]
            if effect is not None:
                time.sleep(effect)
        return self._app(environ, start_response)


@contextmanager
def store_server(monkeypatch):
    """Start a server whose credentials this process has."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    server = StoreServer()
    try:
        yield server
    finally:
        server.close()


def times(number, effect, method, part):
    """A fault for the first requests of a method whose path has a part."""
    left = [number]

    def fault(its_method, path):
        if its_method != method or part not in path or not left[0]:
            return None
        left[0] -= 1
        return effect

    return fault
