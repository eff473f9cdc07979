"""The files of a TLS connection, looked at before each: what is wrong with one is said with its name and the remedy.

asyncpg reads them anew for every connection, so a mended file takes effect without a restart; but of a missing or
damaged one it and OpenSSL say `[Errno 2]` or `PEM lib`, without a name. Where the files are is libpq's way: parameters
of the DSN, else PGSSLROOTCERT and its like, else ~/.postgresql. Limits: what a connection service file says is not
looked at, and a path is relative to the working directory.
"""

from __future__ import annotations

import os
import ssl
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from ingestd.errors import StoreError

VERIFYING = ("verify-ca", "verify-full")


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """What a DSN asks for. A file that is None is neither named nor in its usual place."""

    mode: str
    root: Path | None  # certificates of the CAs that may have signed the server's
    certificate: Path | None  # of this client …
    key: Path | None  # … and its key, which may be in the same file
    key_password: str = field(default="", repr=False)


def files_of(dsn: str) -> TlsFiles | None:
    """The files that asyncpg would read to connect to a DSN; None if it would use no TLS, or not understand the DSN."""
    try:
        parts = urlsplit(dsn)
        query = dict(parse_qsl(parts.query))
    except ValueError:
        return None
    hosts = parts.netloc.rpartition("@")[2] or query.get("host") or os.environ.get("PGHOST", "")
    mode = query.get("sslmode") or os.environ.get("PGSSLMODE") or ("disable" if hosts.startswith("/") else "prefer")
    if mode == "disable":
        return None
    certificate = _named(query, "sslcert", "postgresql.crt")
    return TlsFiles(
        mode,
        _named(query, "sslrootcert", "root.crt") if mode in ("require", *VERIFYING) else None,
        certificate,
        None if certificate is None else _named(query, "sslkey", "postgresql.key"),
        query.get("sslpassword", ""),
    )


def _named(query: Mapping[str, str], parameter: str, usual: str) -> Path | None:
    """The file that a parameter or its variable names, else the one in the usual place if there is one."""
    named = query.get(parameter) or os.environ.get(f"PG{parameter.upper()}")
    if named:
        return Path(named).absolute()
    with suppress(RuntimeError, OSError):  # This user may have no home, or one that is closed to it.
        if (path := Path.home() / ".postgresql" / usual).exists():
            return path
    return None


def check_files(dsn: str) -> None:
    """Raise StoreError, naming the file, unless the files for a connection can be read and understood."""
    files = files_of(dsn)
    if files is None:
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if files.root is not None:
        _check_readable(files.root, "sslrootcert", "the certificate of the CA that signed the server's")
        try:
            context.load_verify_locations(files.root)
        except ssl.SSLError as error:
            raise StoreError(
                f"{files.root} (sslrootcert) holds no certificate that can be read: {error.reason or error}",
                "it has to be the CA's, in PEM: -----BEGIN CERTIFICATE-----",
            ) from error
    elif files.mode in VERIFYING:
        raise StoreError(
            f"sslmode={files.mode} needs the certificate of the CA that signed the server's",
            "name its file in the DSN: sslrootcert=/etc/ingestd/root.crt, or put it into ~/.postgresql/root.crt",
        )
    if files.certificate is None:
        return
    _check_readable(files.certificate, "sslcert", "this client's certificate")
    if files.key is not None:
        _check_readable(files.key, "sslkey", "the key of this client's certificate")
    _check_private(files.key or files.certificate)
    try:
        context.load_cert_chain(files.certificate, files.key, lambda: files.key_password)
    except ssl.SSLError as error:
        raise StoreError(
            f"{files.certificate} (sslcert) and {files.key or 'no other file'} (sslkey) are no certificate with its"
            f" key: {error.reason or error}",
            "both have to be PEM, the key the one of that certificate, and sslpassword its passphrase if it has one",
        ) from error


def _check_readable(path: Path, parameter: str, what: str) -> None:
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        raise StoreError(
            f"{path} ({parameter}) cannot be read: {error.strerror}", f"it has to be {what}, readable by this user"
        ) from error


def _check_private(path: Path) -> None:
    """As libpq demands: a key is its owner's alone; one of root's may be read by a group."""
    status = path.stat()
    others = stat.S_IRWXO | (stat.S_IWGRP | stat.S_IXGRP if status.st_uid == 0 else stat.S_IRWXG)
    if status.st_mode & others:
        raise StoreError(
            f"the key {path} is open to others: its mode is {stat.S_IMODE(status.st_mode):04o}",
            f"chmod 600 {path}; one of root's may be 640",
        )
