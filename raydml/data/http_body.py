"""Ask a web server for a file, or for the rest of it: one request, what it says of the file, and the bytes.

http and https only, also behind redirects. Every fault of the network becomes `Broken`, every answer that another
request will not change `NotServed`.
"""

import http.client
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

from raydml.data.catalog import DataError

CHUNK_BYTES = 1 << 20
PASSING_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})


class NotServed(DataError):
    """The file cannot be had from its address by a program; perhaps by a person with a browser."""


class Broken(Exception):
    """A request that failed in a way that may pass."""


class RangeRefused(Broken):
    """The bytes that are there are not the beginning of what the server has: begin again."""


@dataclass(frozen=True)
class Origin:
    """One version of a file on a server. num_bytes: of the whole file, None where the server does not say."""

    url: str
    num_bytes: int | None
    etag: str | None
    last_modified: str | None

    @property
    def if_range(self) -> str | None:
        """A weak ETag promises the same meaning, not the same bytes, and may not stand in If-Range."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.last_modified

    def contradicts(self, later: "Origin") -> bool:
        """Whether both name a size, an ETag or a date and it is not the same one."""
        pairs = (
            (self.num_bytes, later.num_bytes),
            (self.etag, later.etag),
            (self.last_modified, later.last_modified),
        )
        return any(ours is not None and theirs is not None and ours != theirs for ours, theirs in pairs)


@dataclass(frozen=True)
class Body:
    """start: at which byte of the file the chunks begin; 0 also when the server ignored the wish for a range."""

    start: int
    origin: Origin
    chunks: Iterator[bytes]


@contextmanager
def request(url: str, start: int, origin: Origin | None, stall_s: float) -> Iterator[Body]:
    """The file at `url` from byte `start` on; closed on leaving.

    start, origin: how much of which version is there already; a server that knows of both sends the rest only if it is
    still that version (RFC 9110, sections 13.1.5 and 14.2). stall_s: seconds without a byte before it is Broken.

    Raises Broken, RangeRefused (416), NotServed (any other answer but 200 and 206, a redirect elsewhere, a bad
    certificate, another scheme); Broken also while the chunks are read. A body that is cut short just ends.
    """
    if not url.lower().startswith(("http://", "https://")):
        raise NotServed(f"{url} is neither an http nor an https address")
    headers = {"User-Agent": "raydml", "Accept-Encoding": "identity"}
    if start and origin:
        headers |= {"Range": f"bytes={start}-"} | ({"If-Range": origin.if_range} if origin.if_range else {})
    try:
        response = _opener().open(urllib.request.Request(url, headers=headers), timeout=stall_s)
    except urllib.error.HTTPError as error:
        error.close()
        raise _refusal(url, error) from error
    except (OSError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise NotServed(f"the certificate of {url} cannot be trusted: {reason.verify_message}") from error
        raise Broken(_network_words(reason, stall_s)) from error
    with closing(response):
        begins_at, now = _beginning(response, url)
        yield Body(begins_at, now, _chunks(response, stall_s))


def _refusal(url: str, error: urllib.error.HTTPError) -> Exception:
    answer = f"{error.code} {error.reason}"
    if error.code == 416:
        return RangeRefused(f"the server answered {answer}")
    if error.code in PASSING_STATUS:
        return Broken(f"the server answered {answer}")
    what = "redirects where we do not follow" if 300 <= error.code < 400 else "answers"
    return NotServed(f"{url} {what}: {answer}")


def _beginning(response: http.client.HTTPResponse, url: str) -> tuple[int, Origin]:
    """At which byte the body starts, and what the server says of the whole file."""
    etag, last_modified = response.headers.get("ETag"), response.headers.get("Last-Modified")
    if response.status == 200:
        return 0, Origin(url, response.length, etag, last_modified)
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "").strip())
    if response.status != 206 or not found:
        raise NotServed(f"{url} answers {response.status} {response.reason}, which is no file")
    total = None if found[2] == "*" else int(found[2])
    return int(found[1]), Origin(url, total, etag, last_modified)


def _chunks(response: http.client.HTTPResponse, stall_s: float) -> Iterator[bytes]:
    while True:
        try:
            # read() would gather a whole chunk first and lose it when the connection stalls or Ctrl-C comes.
            chunk = response.read1(CHUNK_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise Broken(_network_words(error, stall_s)) from error
        if not chunk:
            return
        yield chunk


def _network_words(error: object, stall_s: float) -> str:
    if isinstance(error, TimeoutError):
        return f"no byte came for {stall_s:g} s"
    return f"the connection broke ({type(error).__name__}: {error})"


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows to http and https only, and never from https back to http."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        scheme = newurl.partition(":")[0].lower()
        if scheme != "https" and (scheme, req.type) != ("http", "http"):
            raise NotServed(f"{req.full_url} redirects where we do not follow: {newurl}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> urllib.request.OpenerDirector:
    """urllib without its doors to file:, ftp: and data:."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
        _Redirects(),
    ):
        opener.add_handler(handler)
    return opener
