"""A proxy in front of a server on this machine that fails as networks, proxies and disks do."""

import http.client
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple


class Fault(NamedTuple):
    """What becomes of a request: ``status`` is the answer in place of the server's; None cuts the connection.

    arrives: whether the server gets the request nevertheless.
    """

    status: int | None
    arrives: bool = False


@contextmanager
def faulty(port: int, fault_of: Callable[[str], Fault | None], delay_s: float = 0.0) -> Iterator[str]:
    """Give the address of a proxy for 127.0.0.1:port. fault_of: of a request, such as ``GET /health``; None is none.

    delay_s: how late every answer is.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # one packet for an answer: two would wait for each other

        def do_GET(self) -> None:
            body = self._body()
            fault = fault_of(f"{self.command} {self.path}")
            stopped.wait(delay_s)
            if fault is None or fault.arrives:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                own = ("host", "transfer-encoding", "content-length")
                headers = {name: text for name, text in self.headers.items() if name.lower() not in own}
                connection.request(self.command, self.path, body, {**headers, "Host": f"127.0.0.1:{port}"})
                answer = connection.getresponse()
                content, kind = answer.read(), answer.getheader("Content-Type") or "application/json"
                connection.close()
                if fault is None:
                    return self._answer(answer.status, content, kind)
            assert fault is not None
            if fault.status is None:
                self.close_connection = True
                return self.connection.close()
            return self._answer(fault.status, b"<html>an error of the proxy</html>", "text/html")

        do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":  # an empty file is sent in chunks
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        def _answer(self, status: int, content: bytes, kind: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            pass  # a connection that was cut

    stopped = threading.Event()
    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        stopped.set()
        server.shutdown()
        server.server_close()
