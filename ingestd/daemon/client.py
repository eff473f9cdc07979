"""The commands' side of the control socket: a question, an answer, or lines of answer for as long as they come.

Without aiohttp, whose import takes longer than the whole command. What the daemon refuses is raised here as it was
there: a UsageError for what was wrong with the question, an IngestdError for the rest.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ingestd.errors import IngestdError, UsageError

SOCKET_PATH_BYTES_MAX = 107  # sockaddr_un has room for 108, with a NUL (unix(7))
ANSWER_SECONDS_MAX = 60.0


class NoDaemon(IngestdError):
    """Nobody answers at the control socket."""


class _Connection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path, timeout_seconds: float) -> None:
        super().__init__("localhost", timeout=timeout_seconds)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        with reachable(self._path) as name:
            self.sock.connect(name)


def ask(
    path: Path, method: str, target: str, body: Mapping[str, Any] | None = None, *,
    timeout_seconds: float = ANSWER_SECONDS_MAX,
) -> Any:  # fmt: skip
    """Ask the daemon at this socket, and return the JSON of its answer. Raises NoDaemon, UsageError, IngestdError."""
    with asking(path, method, target, body, timeout_seconds=timeout_seconds) as answer:
        return json.loads(answer.read())


def configuration_of(path: Path) -> Path | None:
    """The file that the daemon at this socket runs with; None where none says so. Raises nothing."""
    try:
        return Path(ask(path, "GET", "/daemon")["config"])
    except (IngestdError, KeyError, TypeError):
        return None


def runs_with(path: Path, file: Path) -> bool:
    """Whether a daemon listens at this socket whose configuration is that file. Raises nothing."""
    theirs = configuration_of(path)
    return theirs is not None and same_file(theirs, file)


def same_file(one: Path, other: Path) -> bool:
    """Whether both paths lead to the same place. Raises nothing."""
    try:
        return one.resolve() == other.resolve()
    except (OSError, RuntimeError):  # links in a circle
        return False


@contextmanager
def asking(
    path: Path, method: str, target: str, body: Mapping[str, Any] | None = None, *,
    timeout_seconds: float = ANSWER_SECONDS_MAX,
) -> Iterator[http.client.HTTPResponse]:  # fmt: skip
    """The answer to be read: a file of bytes, line by line for a route that streams. Raises as `ask` does.

    `timeout_seconds` is how long nothing may come.
    """
    connection = _Connection(path, timeout_seconds)
    try:
        try:
            payload = None if body is None else json.dumps(body).encode()
            connection.request(method, target, payload, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            if answer.status != http.client.OK:
                raise _refusal(path, answer.status, answer.read())
            yield answer
        except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError) as error:
            raise NoDaemon(
                f"no daemon runs here: nobody listens at {path}",
                "start it with ingestd run -c FILE, or name its configuration with -c FILE",
            ) from error
        except PermissionError as error:
            raise IngestdError(f"the daemon may not be asked: {path}: {error.strerror}", _who_may(path)) from error
        except TimeoutError as error:
            raise IngestdError(f"the daemon at {path} does not answer", "its log may say why") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise IngestdError(f"the daemon at {path} ended, or is none: {error}", "its log says more") from error
    finally:
        connection.close()


def _refusal(path: Path, status: int, body: bytes) -> IngestdError:
    try:
        said = json.loads(body)
        kind = UsageError if said["exit_code"] == UsageError.exit_code else IngestdError
        return kind(said["error"], said["hint"])
    except (ValueError, KeyError, TypeError):
        if status in (http.client.NOT_FOUND, http.client.METHOD_NOT_ALLOWED):
            return IngestdError(f"the daemon at {path} does not know this question", "is it of another version?")
        return IngestdError(f"the daemon at {path} could not answer: HTTP {status}", "its log says why")


def _who_may(path: Path) -> str:
    try:
        import grp
        import pwd

        status = path.stat()
        user, group = pwd.getpwuid(status.st_uid).pw_name, grp.getgrgid(status.st_gid).gr_name
    except (OSError, KeyError, ImportError):
        return "ask as the daemon's user"
    return f"ask as {user} or as a member of the group {group}"


@contextmanager
def reachable(path: Path) -> Iterator[str]:
    """A name of the path that the kernel takes as a socket's: of a long one, a short one through its folder."""
    if len(os.fsencode(path)) <= SOCKET_PATH_BYTES_MAX:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
