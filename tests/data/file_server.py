"""A web server on this machine that answers as a test decides."""

import random
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BODY = random.Random(1).randbytes(300_000)


class Answer:
    """One answer of the server.

    length: what Content-Length says instead of the truth; None: no such header. cut: how many bytes of the body are
    sent before the connection is closed. stalls: whether it is kept open and silent instead. ranges: whether Range is
    understood, if_range whether If-Range is.
    """

    def __init__(self, body=BODY, *, status=200, headers=None, length="true", cut=None, stalls=False, **more):
        self.body, self.status, self.headers, self.length = body, status, headers or {}, length
        self.cut, self.stalls = cut, stalls
        self.ranges, self.if_range = more.pop("ranges", True), more.pop("if_range", True)
        assert not more

    def send(self, handler, released):
        start = self.start_of(handler)
        handler.send_response(206 if start is not None else self.status)
        part = self.body[start or 0 :]
        if start is not None:
            handler.send_header("Content-Range", f"bytes {start}-{len(self.body) - 1}/{len(self.body)}")
        if self.length is not None:
            handler.send_header("Content-Length", str(len(part) if self.length == "true" else self.length))
        for name, value in self.headers.items():
            handler.send_header(name, value)
        handler.send_header("Connection", "close")
        handler.end_headers()
        handler.wfile.write(part[: self.cut])
        handler.wfile.flush()
        if self.stalls:
            released.wait(20)

    def start_of(self, handler):
        requested = handler.headers.get("Range")
        if self.status != 200 or requested is None or not self.ranges:
            return None
        condition = handler.headers.get("If-Range")
        current = (self.headers.get("ETag"), self.headers.get("Last-Modified"))
        if condition is not None and self.if_range and condition not in current:
            return None
        return int(requested.removeprefix("bytes=").removesuffix("-"))


class Server(ThreadingHTTPServer):
    """Gives its answers in turn, the last one for ever, and keeps the headers of every request."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.requests, self.released = [Answer()], [], threading.Event()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/archive.tgz"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append(dict(self.headers))
        answers = self.server.answers
        try:
            (answers.pop(0) if len(answers) > 1 else answers[0]).send(self, self.server.released)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def log_message(self, *_):
        """Print nothing."""


@contextmanager
def file_server(monkeypatch):
    """A server that runs for a test, with no proxy before it."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()
    thread.join(10)
    assert not thread.is_alive()


def ranges(server):
    """The Range header of each request, None where there was none."""
    return [request.get("Range") for request in server.requests]
