"""What an error of PostgreSQL means: for a batch (kept or rejected) and for the operator (what happened, what to do).

One table, FAULTS, from SQLSTATE to both; the longest prefix wins. Causes and fates:

    TRANSIENT  passes without anybody doing anything      kept      StoreUnavailable
    STATE      lasts until an operator acts               kept      StoreError; a full disk is StoreUnavailable
    DATA       this batch can never go in                 rejected  StoreRejected
    UNKNOWN    none of the above is known to be true      kept      StoreError

Unknown means kept: to reject is the only thing that cannot be made good. No message ever shows a password.
"""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass
from enum import Enum

import asyncpg

from ingestd.errors import StoreError, StoreRejected, StoreUnavailable
from ingestd.store.dsn import place, secrets_in
from ingestd.store.tls import files_of


class Cause(Enum):
    """Why a batch was not copied."""

    TRANSIENT = "transient"
    STATE = "state"
    DATA = "data"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Fault:
    """One row of the table. In `message`, {said} is the server's own sentence, {where} the database, {root} the CAs."""

    cause: Cause
    message: str
    hint: str = ""
    retry: bool = False  # whether it may pass: StoreUnavailable


def _transient(message: str, hint: str = "") -> Fault:
    return Fault(Cause.TRANSIENT, message, hint, retry=True)


def _state(message: str, hint: str, *, retry: bool = False) -> Fault:
    return Fault(Cause.STATE, message, hint, retry)


UNREACHABLE = _transient("PostgreSQL cannot be reached at {where}: {said}", "is it running, and is the address right?")
BROKEN = _transient("the connection to {where} broke: {said}")
UNKNOWN = Fault(Cause.UNKNOWN, "PostgreSQL at {where} failed: {said}")
BAD_DSN = _state("the address of the database cannot be used: {said}", "it looks like postgresql://user@host:5432/name")
TIMED_OUT = _transient(
    "PostgreSQL at {where} did not answer in time", "is the address right, is a firewall in between?"
)

_NO_TLS = _state(
    "PostgreSQL at {where} has no TLS, and the DSN demands it",
    "on the server: ssl = on in postgresql.conf, with ssl_cert_file and ssl_key_file",
)
_TLS = _transient("TLS with PostgreSQL at {where} failed: {said}", "the server's log may say more")
_NOT_ACCEPTED = _state(
    "PostgreSQL at {where} does not accept this client's certificate: {said}",
    "sslcert has to be valid, and signed by a CA in the server's ssl_ca_file",
)
_UNKNOWN_CA = _state(
    "the certificate of PostgreSQL at {where} is not signed by a CA in {root}: {said}",
    "sslrootcert in the DSN has to name the certificate of the CA that signed it",
)
_WRONG_HOST = _state(
    "the certificate of PostgreSQL at {where} is not for that host: {said}",
    "name the host in the DSN as the certificate does, or have the certificate say this name (subjectAltName)",
)
# OpenSSL's codes of verification (openssl-verification-options(1), x509_vfy.h).
_VERIFICATION: dict[int, Fault] = {
    9: _transient("the certificate of PostgreSQL at {where} is not valid yet", "is the clock of this machine right?"),
    10: _state(
        "the certificate of PostgreSQL at {where} has expired", "renew it on the server; is this machine's clock right?"
    ),
    18: _UNKNOWN_CA,  # signed by itself
    19: _UNKNOWN_CA,
    20: _UNKNOWN_CA,
    21: _UNKNOWN_CA,
    62: _WRONG_HOST,
    64: _WRONG_HOST,  # the same of an address
}
_UNVERIFIED = _state(
    "the certificate of PostgreSQL at {where} cannot be trusted: {said}", "see sslrootcert and sslcrl in the DSN"
)

_NO_SCHEMA = _state(
    "the database {where} has no ingestd schema, or another one: {said}", "run `ingestd db init`, or `ingestd db check`"
)
_DATA = Fault(Cause.DATA, "PostgreSQL cannot store this data: {said}")

# https://www.postgresql.org/docs/current/errcodes-appendix.html
FAULTS: dict[str, Fault] = {
    "08": _transient("the connection to {where} failed: {said}", "trying again helps when it is back"),
    "08P01": UNKNOWN,  # A protocol violation, but a malformed array in binary COPY says so too.
    "0A": UNKNOWN,
    "22": _DATA,
    "22023": UNKNOWN,  # An invalid parameter value: a setting, not the data.
    "23502": _DATA,
    "23514": _DATA,
    "25006": _state("the database {where} is read-only", "is it a standby? Use the address of the primary", retry=True),
    "2BP01": _state("{said}", "drop or change what depends on it, which psql shows with \\d+; then run it again"),
    "28": _state(
        "PostgreSQL at {where} refuses the login: {said}",
        "check the user in the DSN (where it names none it is you: sudo -u), and pg_hba.conf; where that says cert,"
        " sslcert and sslkey in the DSN name a certificate whose common name is the user",
    ),
    "28P01": _state("wrong password: {said}", "set it in the DSN, in PGPASSWORD or in ~/.pgpass"),
    "3D000": _state("{said}", "create it: `createdb` with the name, or CREATE DATABASE"),
    "3F000": _NO_SCHEMA,
    "40001": _transient("another transaction got in the way at {where}: {said}"),
    "40P01": _transient("a deadlock at {where}: {said}"),
    "42501": _state(
        "no permission at {where}: {said}",
        "as owner: `ingestd db grant` with --writer, --reader or both and this user's name",
    ),
    "42703": _NO_SCHEMA,
    "42804": _NO_SCHEMA,
    "42883": _NO_SCHEMA,
    "42P01": _NO_SCHEMA,
    "42P07": _state(
        "the database {where} already has something of that name: {said}",
        "use a database of its own, or a schema of its own in the user's search_path",
    ),
    "53": _transient("PostgreSQL at {where} is short of resources: {said}"),
    "53100": _state("the server's disk is full ({where}): {said}", "free space on the server", retry=True),
    "53200": _transient("PostgreSQL at {where} is out of memory: {said}"),
    "53300": _transient(
        "PostgreSQL at {where} has too many connections: {said}", "raise max_connections, or close some"
    ),
    "54": _DATA,
    "55P03": _transient("something at {where} is locked: {said}"),
    "57014": _transient("the statement was cancelled at {where}: {said}", "is statement_timeout too short?"),
    "57P": _transient("PostgreSQL at {where} is shutting down or starting up: {said}"),
    "57P04": _state("the database {where} was dropped", "create it, then run `ingestd db init`"),
    "58": _transient(
        "PostgreSQL at {where} has trouble with its disk: {said}",
        "see the server's log",
    ),
}


def _origin(error: BaseException) -> BaseException:
    """The driver's or the system's error inside of what SQLAlchemy and `raise … from` wrapped around it."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, asyncpg.PostgresError | asyncpg.InterfaceError | OSError):
            return seen
        seen = seen.__cause__ or getattr(seen, "orig", None)
    return error


def sqlstate(error: BaseException) -> str | None:
    """The five characters with which the server classified the error; None if it was not the server's."""
    return getattr(_origin(error), "sqlstate", None)


def classify(error: BaseException) -> Fault:
    """The row of the table for an error of asyncpg, of SQLAlchemy around it, or of the system."""
    origin = _origin(error)
    code = sqlstate(origin)
    if code is not None:
        for length in (5, 3, 2):
            if code[:length] in FAULTS:
                return FAULTS[code[:length]]
        return UNKNOWN
    if isinstance(origin, TimeoutError):
        return TIMED_OUT
    if isinstance(origin, ssl.SSLCertVerificationError):  # A ValueError, too.
        return _VERIFICATION.get(origin.verify_code, _UNVERIFIED)
    if isinstance(origin, ssl.SSLError):
        is_about_ours = re.search("ALERT.*(CERT|UNKNOWN_CA)", origin.reason or "")
        return _NOT_ACCEPTED if is_about_ours else _TLS
    # asyncpg's ClientConfigurationError is one, and so is a port in words; one beyond 65535 is the other.
    if isinstance(origin, ValueError | OverflowError):
        return BAD_DSN
    if isinstance(origin, OSError):
        return _NO_TLS if "rejected SSL upgrade" in str(origin) else UNREACHABLE  # asyncpg has no type for it.
    if isinstance(origin, asyncpg.InterfaceError | asyncpg.InternalClientError):
        return BROKEN
    return UNKNOWN


def translate(error: BaseException, dsn: str) -> StoreError:
    """The error as one sentence for the operator, with a hint; StoreUnavailable if trying again later is right."""
    fault = classify(error)
    origin = _origin(error)
    said = " ".join(str(origin).split()) or type(error).__name__
    if fault is BAD_DSN and not isinstance(origin, asyncpg.InterfaceError):
        # Python's own words quote what they do not understand, which may be part of a password.
        said = "it is no such address, or a port in it is no number"
    for secret in secrets_in(dsn):
        said = said.replace(secret, "…")
    kind = StoreUnavailable if fault.retry else StoreRejected if fault.cause is Cause.DATA else StoreError
    files, hint = files_of(dsn), fault.hint
    root = files.root if files is not None and files.root is not None else "the file of sslrootcert"
    if fault is FAULTS["08"] and files is not None and files.certificate is not None:
        # TLS 1.3: a server that does not take a client's certificate hangs up after the handshake, and says no more.
        hint += f"; if it is not: {files.certificate} has to be valid, and signed by a CA in the server's ssl_ca_file"
    return kind(fault.message.format(said=said, where=place(dsn), root=root), hint)
