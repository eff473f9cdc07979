"""The control socket over real sockets: who may use it, whose it is, and what the commands say when nobody answers."""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import os
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import uvloop
from aiohttp import web

from ingestd.config import find_control_socket, likely_control_socket, load_config
from ingestd.daemon import control, limited
from ingestd.daemon.client import NoDaemon, ask, asking
from ingestd.daemon.control import json_of, serve
from ingestd.daemon.limited import CONNECTIONS_MAX
from ingestd.errors import ConfigError, IngestdError, UsageError


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that another task does."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def asked(path: Path, method: str, target: str, body: dict[str, Any] | None = None) -> Any:
    """What a command gets, which waits without a loop."""
    return await asyncio.to_thread(ask, path, method, target, body)


async def greeted(path: Path) -> Any:
    """The answer of whoever comes to listen there."""
    async with asyncio.timeout(30):
        while True:
            try:
                return await asked(path, "GET", "/hello")
            except NoDaemon:
                await asyncio.sleep(0.01)


async def _hello(request: web.Request) -> web.Response:
    return web.json_response({"hello": "there", **await json_of(request)})


async def _refuse(request: web.Request) -> web.Response:
    said = await json_of(request)
    raise (UsageError if said.get("usage") else IngestdError)("it is so", said.get("hint", ""))


async def _count(request: web.Request) -> web.StreamResponse:
    answer = web.StreamResponse()
    await answer.prepare(request)
    for number in range(3):
        await answer.write(b"%d\n" % number)
    return answer


ROUTES = [
    web.get("/hello", _hello),
    web.post("/hello", _hello),
    web.post("/refuse", _refuse),
    web.get("/count", _count),
]


async def test_questions_and_answers(tmp_path: Path) -> None:
    """JSON both ways; what the daemon refuses is raised at the other end as it was there; a route may stream."""
    path = tmp_path / "folder" / "control.sock"
    async with serve(path, ROUTES):
        await until(path.exists)
        assert await asked(path, "GET", "/hello") == {"hello": "there"}
        assert await asked(path, "POST", "/hello", {"to": "Kim Ä"}) == {"hello": "there", "to": "Kim Ä"}
        with pytest.raises(UsageError, match=r"^it is so \(do that\)$") as wrong:
            await asked(path, "POST", "/refuse", {"usage": True, "hint": "do that"})
        assert (wrong.value.hint, wrong.value.exit_code) == ("do that", 2)
        with pytest.raises(IngestdError, match=r"^it is so$") as failed:
            await asked(path, "POST", "/refuse", {})
        assert failed.value.exit_code == 1
        with pytest.raises(IngestdError, match="does not know this question"):
            await asked(path, "GET", "/nothing")

        def lines() -> list[bytes]:
            with asking(path, "GET", "/count") as answer:
                return list(answer)

        assert await asyncio.to_thread(lines) == [b"0\n", b"1\n", b"2\n"]
    assert not path.exists()


def test_more_connections_than_it_bears(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They are told so and closed; recording keeps its file descriptors, and who ends makes room."""
    path = tmp_path / "control.sock"

    async def work() -> None:
        async with serve(path, ROUTES):
            await until(path.exists)
            others = [await asyncio.open_unix_connection(path) for _ in range(CONNECTIONS_MAX)]
            for _ in range(3):
                with pytest.raises(IngestdError, match="32 connections are open already"):
                    await asked(path, "GET", "/hello")
            others[0][1].close()
            assert await until_answered(path) == {"hello": "there"}
            for _, writer in others[1:]:
                writer.close()

    uvloop.run(work())
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []


def descriptors() -> int:
    """How many files this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


def test_no_flood_takes_the_file_descriptors(tmp_path: Path) -> None:
    """However many connect at once and ask nothing: only so many are kept open."""
    path = tmp_path / "control.sock"

    async def work() -> None:
        async with serve(path, ROUTES):
            await until(path.exists)
            begin = descriptors()
            flood = []
            for _ in range(200):
                flood.append(socket.socket(socket.AF_UNIX))
                flood[-1].setblocking(False)
                with suppress(BlockingIOError):
                    flood[-1].connect(str(path))
                await asyncio.sleep(0)
            bound = begin + len(flood) + CONNECTIONS_MAX + limited.REFUSALS_MAX
            await asyncio.sleep(0.1)  # Until all of them are accepted.
            assert descriptors() <= bound + 2
            for each in flood:
                each.close()

    uvloop.run(work())


def test_connections_that_ask_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are closed after a while: whoever holds all of them keeps nobody out for long."""
    monkeypatch.setattr(limited, "SILENT_SECONDS_MAX", 0.2)
    path = tmp_path / "control.sock"

    async def work() -> None:
        async with serve(path, ROUTES):
            await until(path.exists)
            silent = [await asyncio.open_unix_connection(path) for _ in range(CONNECTIONS_MAX + 1)]
            assert await until_answered(path) == {"hello": "there"}
            async with asyncio.timeout(30):
                assert [await reader.read() for reader, _ in silent] == [b""] * len(silent)
            for _, writer in silent:
                writer.close()

    uvloop.run(work())


async def until_answered(path: Path) -> Any:
    """The answer, once there is room for the question."""
    async with asyncio.timeout(30):
        while True:
            with suppress(IngestdError):
                return await asked(path, "GET", "/hello")
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("body", [b"{", b"[]", b'"x"', b"\xff"])
async def test_a_body_that_is_no_object(tmp_path: Path, body: bytes) -> None:
    """Refused as a mistake of the caller's."""
    path = tmp_path / "control.sock"

    def send() -> tuple[int, Any]:
        with socket.socket(socket.AF_UNIX) as caller:
            caller.connect(str(path))
            connection = http.client.HTTPConnection("localhost")
            connection.sock = caller
            connection.request("POST", "/hello", body)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())

    async with serve(path, ROUTES):
        await until(path.exists)
        status, said = await asyncio.to_thread(send)
        assert status == 400
        assert said["exit_code"] == 2


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
async def test_only_the_user_and_the_group_may_use_it(tmp_path: Path, umask: int) -> None:
    """Mode 0660 whatever the umask, and a folder made for it lets nobody else in."""
    before = os.umask(umask)
    try:
        path = tmp_path / "made" / "control.sock"
        async with serve(path, ROUTES):
            assert (await greeted(path))["hello"] == "there"
            modes = [stat.S_IMODE(os.lstat(each).st_mode) for each in (path, path.parent)]
    finally:
        os.umask(before)
    assert modes[0] == 0o660
    assert not modes[1] & 0o007


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder into which others may look, unlike pytest's."""
    with tempfile.TemporaryDirectory(prefix="ingestd-test-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
async def test_somebody_else_may_not(open_folder: Path) -> None:
    """Another user is refused by the kernel, and told who may."""
    path = open_folder / "control.sock"
    code = (
        "import grp, os, pwd, sys; from pathlib import Path; from ingestd.daemon.client import ask\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        f"ask(Path({str(path)!r}), 'GET', '/hello')"
    )
    async with serve(path, ROUTES):
        await until(path.exists)
        done = await asyncio.to_thread(
            subprocess.run, [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
        )
    assert done.returncode == 1
    assert "may not be asked" in done.stderr
    assert "ask as root or as a member of the group" in done.stderr


async def test_the_socket_of_a_killed_daemon_is_replaced(tmp_path: Path) -> None:
    """Nobody listens at it: it is taken over at once."""
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))
        killed.listen()
    with pytest.raises(NoDaemon, match="nobody listens"):
        ask(path, "GET", "/hello")
    async with serve(path, ROUTES):
        assert (await greeted(path))["hello"] == "there"


async def test_that_of_a_running_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The second says so once and keeps trying; when the first has ended the socket becomes its own."""
    monkeypatch.setattr(control, "RETRY_SECONDS_MIN", 0.5)
    monkeypatch.setattr(control, "RETRY_SECONDS_MAX", 0.5)
    path = tmp_path / "control.sock"
    async with serve(path, [web.get("/hello", _first)]):
        await greeted(path)
        async with serve(path, ROUTES) as later:
            await until(lambda: "another daemon listens there" in caplog.text)
            await asyncio.sleep(1.1)  # several attempts
            assert caplog.text.count("cannot listen") == 1
            assert "not yet" in repr(later)
            assert await asked(path, "GET", "/hello") == {"hello": "first"}
        assert path.exists(), "the one that never had it has removed it"
        assert await asked(path, "GET", "/hello") == {"hello": "first"}
        waiting = serve(path, ROUTES)
        await waiting.__aenter__()
        await until(lambda: caplog.text.count("cannot listen") == 2)
        await greeted(path)  # The first has let in, and out, who only looked whether it is there.
    assert (await greeted(path))["hello"] == "there"
    await waiting.__aexit__(None, None, None)


async def _first(_: web.Request) -> web.Response:
    return web.json_response({"hello": "first"})


async def test_a_socket_that_somebody_deletes_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where something else is put in its place, as soon as that is gone."""
    monkeypatch.setattr(control, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(control, "RETRY_SECONDS_MIN", 0.01)
    monkeypatch.setattr(control, "RETRY_SECONDS_MAX", 0.02)
    path = tmp_path / "control.sock"
    async with serve(path, ROUTES):
        await until(path.exists)
        path.unlink()
        await until(path.exists)
        assert await asked(path, "GET", "/hello") == {"hello": "there"}
        path.unlink()
        path.write_text("not a socket")
        await asyncio.sleep(0.1)
        assert path.read_text() == "not a socket"
        path.unlink()
        await until(path.exists)
        assert await asked(path, "GET", "/hello") == {"hello": "there"}
    assert not path.exists()


async def test_a_place_where_no_socket_can_be(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is said, with what to do, and nothing else happens."""
    caplog.set_level(logging.WARNING)
    (tmp_path / "file").touch()
    async with serve(tmp_path / "file" / "control.sock", ROUTES):
        await until(lambda: "cannot listen" in caplog.text)
    assert "control.socket" in caplog.text


async def test_a_path_that_is_too_long_for_the_kernel(tmp_path: Path) -> None:
    """It is reached through its folder, from both sides."""
    path = tmp_path / ("d" * 60) / ("e" * 60) / "control.sock"
    assert len(str(path)) > 107
    async with serve(path, ROUTES):
        await until(path.exists)
        assert await asked(path, "GET", "/hello") == {"hello": "there"}
    assert not path.exists()


def test_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the journal, or where the configuration says; whatever else is wrong with that."""
    monkeypatch.setenv("INGESTD_HOME", str(tmp_path))
    assert find_control_socket(None) == tmp_path / "journal.sock"
    file = tmp_path / "car.toml"
    for text, expected in (
        ("", tmp_path / "journal.sock"),
        ("[[can]]\nnonsense = 1\n", tmp_path / "journal.sock"),
        ('[journal]\npath = "of/car"\n', tmp_path / "of" / "car.sock"),
        ('[journal]\npath = "of/car"\n[control]\nsocket = "here"\n', tmp_path / "here"),
    ):
        file.write_text(text)
        assert find_control_socket(file) == expected
    file.write_text("[control]\nsocket = 7\n")
    with pytest.raises(ConfigError, match=r"control\.socket"):
        find_control_socket(file)
    assert likely_control_socket(file) == tmp_path / "journal.sock"
    # What can be read of a file that is no TOML says where, wherever the mistake is; else it is the default.
    for text, expected in (
        ('[journal]\npath = "of/car"\n[[can]\n', tmp_path / "of" / "car.sock"),
        ('[[can]]\nname = "can0\n[control]\nsocket = "here"\n', tmp_path / "here"),
        ('[journal]\npath = "of/car\n', tmp_path / "journal.sock"),
        ("\0", tmp_path / "journal.sock"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match="not TOML"):
            find_control_socket(file)
        assert likely_control_socket(file) == expected
    file.write_bytes(b"\xff")
    assert likely_control_socket(file) == likely_control_socket(tmp_path / "gone") == tmp_path / "journal.sock"
    file.write_text('journal = 7\n[database]\ndsn = "postgresql:///x"\n[[can]]\nname = "can0"\n')
    assert find_control_socket(file) == tmp_path / "journal.sock"
    with pytest.raises(ConfigError, match="journal"):
        load_config(file)


def test_no_daemon(tmp_path: Path) -> None:
    """A command says that none runs, where it looked, and what to do; exit code 1 and no traceback."""
    file = tmp_path / "car.toml"
    file.write_text('[journal]\npath = "journal"\n')
    for command in (["sessions", "stop"], ["sessions", "mark", "x"], ["sessions", "edit", "driver=Kim"]):
        done = subprocess.run(
            [sys.executable, "-m", "ingestd", *command, "-c", str(file)], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 1
        assert f"nobody listens at {tmp_path / 'journal.sock'}" in done.stderr
        assert "ingestd run -c" in done.stderr
        assert "Traceback" not in done.stderr
