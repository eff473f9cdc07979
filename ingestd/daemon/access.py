"""Who gets in at the HTTP side, and under what certificate: basic authentication (RFC 7617) and TLS, each if wanted.

A password is kept as its bcrypt hash, which takes a quarter of a second to verify, so that stolen hashes are worth
little. What that costs is bounded: one at a time, in a thread, and whoever has got in is remembered for a while.
/health is for everybody: it says nothing but that the process is alive.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import ssl
import time
from base64 import b64decode
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import bcrypt
from aiohttp import web
from aiohttp.typedefs import Middleware

REFUSED_SECONDS: Final = 60.0  # how often the log tells of logins that were refused, at most
REMEMBERED_SECONDS: Final = 300.0
REMEMBERED_MAX: Final = 32
PASSWORD_BYTES_MAX: Final = 72  # of bcrypt
OPEN_PATHS: Final = frozenset({"/health"})
# Of nobody: who names a user that is not there waits as long as for one who is.
NOBODY: Final = "$2b$12$LQv3c1yqBWVHxkd0LHAkCOYz6TtxMQJqhN8/LewdBPj4J/HS.iK8."

USER: Final = web.RequestKey("user", str)

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Access:
    """The rules: hashes by name, none of which is everybody; and a certificate, without which there is no TLS."""

    users: Mapping[str, str] = field(default_factory=dict, repr=False)
    certificate: Path | None = None
    key: Path | None = None

    def ssl_context(self) -> ssl.SSLContext | None:
        """What to serve with. Raises OSError, whose `strerror` names the file and what is wrong with it."""
        if self.certificate is None:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        for path in (self.certificate, self.key):
            try:
                if path is not None:
                    path.read_bytes()  # OpenSSL would not say which.
            except OSError as error:
                raise OSError(error.errno, f"{path}: {error.strerror}") from error
        try:
            # A key that has a password would be asked for at a terminal that nobody looks at.
            context.load_cert_chain(self.certificate, self.key, password=lambda: "")
        except ssl.SSLError as error:
            if self.key is None:
                said = f"{self.certificate} is no certificate with its key; a key of its own: http.tls_key"
            else:
                reason = (error.reason or "they are none").replace("_", " ").lower()
                said = f"{self.certificate} and {self.key} cannot be used as certificate and key: {reason}"
            raise OSError(None, said) from error
        return context


class Doorkeeper:
    """Lets those in who are known, and says to the handlers who it is: `request[USER]`."""

    def __init__(self, users: Mapping[str, str]) -> None:
        self._users = users
        self._key = secrets.token_bytes(32)
        self._known: dict[bytes, tuple[str, float]] = {}  # by what was sent, keyed: no password stays in memory
        self._verifying = asyncio.Lock()
        self._refused, self._say_refused_at = 0, 0.0

    def __repr__(self) -> str:
        return f"<Doorkeeper of {len(self._users)} users>"

    async def user_of(self, authorization: str) -> str | None:
        """The name of who sends this header, if the password is right."""
        digest = hashlib.blake2b(authorization.encode(errors="replace"), key=self._key).digest()
        if (known := self._fresh(digest)) is not None:
            return known
        async with self._verifying:
            if (known := self._fresh(digest)) is not None:
                return known
            given = _name_and_password(authorization)
            if given is None:
                return None
            name, password = given
            hashed = self._users.get(name, NOBODY)
            is_right = await asyncio.to_thread(_is_right, password, hashed)
        if not is_right or name not in self._users:
            return None
        while len(self._known) >= REMEMBERED_MAX:
            del self._known[next(iter(self._known))]
        self._known[digest] = name, time.monotonic() + REMEMBERED_SECONDS
        return name

    def refused(self, remote: str | None) -> None:
        """Somebody has given a wrong name or password. Not which: people type passwords where names belong."""
        self._refused += 1
        if (now := time.monotonic()) >= self._say_refused_at:
            log.warning("wrong name or password at the HTTP side tries=%d last_from=%s", self._refused, remote)
            self._refused, self._say_refused_at = 0, now + REFUSED_SECONDS

    def _fresh(self, digest: bytes) -> str | None:
        name, until = self._known.get(digest, ("", 0.0))
        return name if time.monotonic() < until else None


def only_for(users: Mapping[str, str]) -> Middleware:
    """A middleware that keeps out whoever is not one of the users."""
    keeper = Doorkeeper(users)

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path not in OPEN_PATHS:
            given = request.headers.get("Authorization", "")
            user = await keeper.user_of(given)
            if user is None:
                if given:
                    keeper.refused(request.remote)
                asked = {"WWW-Authenticate": 'Basic realm="ingestd", charset="UTF-8"'}
                raise web.HTTPUnauthorized(
                    headers=asked,
                    text="name or password is wrong or missing; who may: http.users in the recorder's configuration\n",
                )
            request[USER] = user
        return await handler(request)

    return check


def hash_of(password: str) -> str:
    """What http.users holds for a password. Raises ValueError for one that bcrypt would cut."""
    encoded = password.encode()
    if b"\0" in encoded:
        raise ValueError("has a NUL in it, where it would end")
    if len(encoded) > PASSWORD_BYTES_MAX:
        raise ValueError(f"has {len(encoded)} bytes, and more than {PASSWORD_BYTES_MAX} are not told apart")
    return bcrypt.hashpw(encoded, bcrypt.gensalt()).decode()


def _name_and_password(authorization: str) -> tuple[str, str] | None:
    scheme, _, encoded = authorization.partition(" ")
    try:
        name, colon, password = b64decode(encoded, validate=True).decode().partition(":")
    except ValueError:
        return None
    return (name, password) if scheme.lower() == "basic" and colon else None


def _is_right(password: str, hashed: str) -> bool:
    encoded = password.encode()
    return len(encoded) <= PASSWORD_BYTES_MAX and b"\0" not in encoded and bcrypt.checkpw(encoded, hashed.encode())
