"""Addresses of stores and their secrets: a login before the host, and parameters such as ``token``."""

from __future__ import annotations

import re

#: Parameters of an address, or of an ODBC connection in it (%3D is an encoded =, %3B an encoded ;).
_SECRETS = re.compile(
    r"((?:^|[?&;\s]|%3B)[\w.-]*(?:access_?key|api_?key|password|passwd|pwd|secret|signature|token)(?:=|%3D))"
    r"(?:(?!%3B)[^&;\s'\"])+",
    re.IGNORECASE,
)


def is_address(path: object) -> bool:
    """Return whether a path is the address of an object store, such as ``s3://bucket/x``, and not of a folder.

    A `Path` has only one of its two slashes.
    """
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)) is not None


def redacted(text: str) -> str:
    """Return the text without the ``user:password@`` of any address in it, and without the secrets of its query.

    A password may contain / and @, so everything before the last @ of an address is left out; a slash directly after
    :// begins a path, which has no password.
    """
    text = re.sub(r"(\w://)[^/\s'\"][^\s'\"]*@", r"\1***@", text)
    return re.sub(_SECRETS, r"\1***", text)


def without_secrets(uri: str) -> str:
    """Return an address without what nobody else may read: its login, and the secrets of its query.

    The user of a database stays: a password for it can come from elsewhere (PGPASSWORD, a file of its client).
    """
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme.startswith("sqlite"):  # the address of a file
        return uri
    is_web = scheme.lower() in ("http", "https")
    end = re.search("[/?#]" if is_web else "[?]", rest)  # the password of a database may contain a slash
    num_characters = end.start() if end else len(rest)
    login, at, host = rest[:num_characters].rpartition("@")
    user = "" if is_web else login.partition(":")[0]
    uri = f"{scheme}://{user}{at if user else ''}{host}{rest[num_characters:]}"
    uri = re.sub(_SECRETS, lambda found: "?" if found.group(1).startswith("?") else "", uri)
    return uri.replace("?&", "?").rstrip("?")
