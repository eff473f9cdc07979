"""A DSN for people: where it leads, and never a password.

A DSN may be wrong in any way. Of one that may have part of a password in another place than a password's nothing is
shown at all: `/`, `?` and `#` in a password end the part of an address that they are in, unless written as %2F …
"""

from __future__ import annotations

import os
from urllib.parse import parse_qsl, unquote, urlsplit, urlunsplit

SECRET = ("password", "sslpassword")
UNCLEAR = "(a DSN that cannot be parsed)"


def place(dsn: str) -> str:
    """Host, port and database of a DSN: `db.garage:5432/telemetry`, or a folder for a Unix socket."""
    try:
        parts = urlsplit(dsn)
    except ValueError:
        return UNCLEAR
    address = parts.netloc.rpartition("@")[2]
    is_split = "@" not in parts.netloc and "@" in parts.query  # postgresql://user:pass?word@host
    if is_split or parts.fragment or "@" in parts.path or parts.scheme not in ("postgresql", "postgres"):
        return UNCLEAR
    query = dict(parse_qsl(parts.query))
    host = address or query.get("host") or os.environ.get("PGHOST") or "localhost"
    database = unquote(parts.path.lstrip("/")) or query.get("dbname") or os.environ.get("PGDATABASE", "")
    if host.startswith("/"):
        return f"{database} in {host}" if database else host
    port = query.get("port") or os.environ.get("PGPORT") or "5432"
    address = host if host.rpartition("]")[2].count(":") else f"{host}:{port}"
    return f"{address}/{database}" if database else address


def secrets_in(dsn: str) -> list[str]:
    """Every password in a DSN, as it is written and as it is meant, the longest first."""
    try:
        parts = urlsplit(dsn)
    except ValueError:
        return []
    written = [parts.netloc.rpartition("@")[0].partition(":")[2]]
    written += [value for key, value in map(_split, parts.query.split("&")) if key in SECRET]
    meant = [value for key, value in parse_qsl(parts.query) if key in SECRET]
    return sorted({*written, *map(unquote, written), *meant} - {""}, key=len, reverse=True)


def without_secrets(dsn: str) -> tuple[str, str | None]:
    """The DSN without its passwords and otherwise as it was, and the one for the server, if there was one."""
    parts = urlsplit(dsn)
    login, at, host = parts.netloc.rpartition("@")
    user, colon, password = login.partition(":")
    query = "&".join(part for part in parts.query.split("&") if _split(part)[0] not in SECRET)
    given = dict(parse_qsl(parts.query)).get("password")
    bare = urlunsplit(parts._replace(netloc=f"{user}{at}{host}", query=query))
    # urlunsplit leaves out the slashes of an address without a host.
    bare = bare if "://" in bare else bare.replace(":", "://", 1)
    return bare, unquote(password) if colon and password else given


def _split(part: str) -> tuple[str, str]:
    key, _, value = part.partition("=")
    return unquote(key), value
