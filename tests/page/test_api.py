"""What the page asks for, over real sockets: files, server-sent events, changes; and watchers who do harm."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import itertools
import json
import socket
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest

from ingestd.daemon.api import message
from ingestd.daemon.limited import CONNECTIONS_MAX
from ingestd.daemon.page import FOLDER, plotly_file
from tests.books import in_metrics
from tests.commands import assert_every_number_once
from tests.page.conftest import address_of
from tests.recorder import Instrument, Recorder, lines_of, wait_until

pytestmark = pytest.mark.slow

SECONDS_MAX = 30.0


@asynccontextmanager
async def watching(recorder: Recorder, query: str = "") -> AsyncIterator[AsyncIterator[tuple[str, Any]]]:
    """Messages as they come."""

    async def messages(answer: aiohttp.ClientResponse) -> AsyncIterator[tuple[str, Any]]:
        kind = ""
        async for line in answer.content:
            name, _, said = line.decode().rstrip("\n").partition(": ")
            if name == "event":
                kind = said
            elif name == "data":
                yield kind, json.loads(said)

    address = await asyncio.to_thread(address_of, recorder)
    limit = aiohttp.ClientTimeout(total=SECONDS_MAX)
    async with (
        aiohttp.ClientSession(timeout=limit, read_bufsize=1 << 22) as client,
        client.get(f"http://{address}/api/live{query}") as answer,
    ):
        assert answer.status == 200, await answer.text()
        assert answer.content_type == "text/event-stream"
        yield messages(answer)


async def test_what_is_told(daemon: Recorder) -> None:
    """First who speaks, the session and the state; then values in turn with states, each second."""
    async with watching(daemon, "?pattern=GGA.alt&seconds=0.1") as messages:
        first = [await anext(messages) for _ in range(2)]
        assert [kind for kind, _ in first] == ["hello", "session"]
        assert first[0][1]["may_change"] is True
        values, states = [], []
        async for kind, said in messages:
            if kind == "values":
                values += said
            if kind == "state":
                states.append((time.monotonic(), said))
            if len(states) == 4:
                break
    heights = [value for value in values if value["channel"] == "GGA.alt"]
    assert len(heights) > 8
    for before, value in itertools.pairwise(heights):
        # Nothing between two values is left out of their range: each sample is higher than the one before.
        assert value["minimum"] == before["value_num"] + 1
        assert value["maximum"] == value["value_num"]
        assert value["samples"] > before["samples"]
    (gps,) = states[-1][1]["sources"]
    assert (gps["source"], gps["link"], gps["balanced"]) == ("gps", "open", True)
    assert 50 < gps["frames_per_second"] < 250
    assert 2.0 < states[-1][0] - states[0][0] < 5.0
    assert states[-1][1]["database_up"] is False
    assert states[-1][1]["trouble"]["database"]


async def test_a_question_that_cannot_be(daemon: Recorder) -> None:
    """Is refused, as on the control socket. A long pattern takes long to compile, where the buses are read."""
    address = await asyncio.to_thread(address_of, daemon)
    long = "*?" * 101
    for question, hint in (("seconds=0", "from 0.05 to 60 can be had"), (f"pattern={long}", "200 are the most")):
        async with aiohttp.ClientSession() as client, client.get(f"http://{address}/api/live?{question}") as answer:
            assert answer.status == 400
            assert (await answer.json())["hint"] == hint


def ask(recorder: Recorder, path: str, body: Any = None, method: str = "POST", **headers: str) -> tuple[int, Any]:
    """Status and JSON of an answer to a change as the page asks for it, but for the headers."""
    address = address_of(recorder)
    sent = {"Content-Type": "application/json", "Origin": f"http://{address}"} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    data = None if method == "GET" else json.dumps(body or {}).encode()
    question = urllib.request.Request(f"http://{address}{path}", data, sent, method=method)
    try:
        with urllib.request.urlopen(question, timeout=SECONDS_MAX) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_who_may_change_the_session(daemon: Recorder) -> None:
    """The page here may; another origin, another name for us, a form, and who comes through a proxy may not."""
    daemon.wait_for("link up")
    status, said = ask(daemon, "/api/session/mark", {"text": "here"})
    assert (status, set(said)) == (200, {"session"})
    status, said = ask(daemon, "/api/session", {"driver": "Kim"}, "PATCH")
    assert (status, said["session"]["driver"]) == (200, "Kim")
    for path, method in (("/api/session/mark", "POST"), ("/api/session/stop", "POST"), ("/api/session", "PATCH")):
        for headers in (
            {"Origin": "http://evil.example"},
            {"Host": "evil.example", "Origin": "http://evil.example"},
            {"Content_Type": "text/plain"},
            {"X_Forwarded_For": "192.0.2.7"},
        ):
            status, said = ask(daemon, path, {"driver": "Eve", "text": "no"}, method, **headers)
            assert status == 403, (path, headers)
            assert said["error"]
            assert said["hint"]
    assert ask(daemon, "/api/session", method="GET")[1]["session"]["driver"] == "Kim"
    assert ask(daemon, "/api/session", method="GET", Host="evil.example")[0] == 403
    assert ask(daemon, "/api/session/mark", {"text": ""})[0] == 400


def test_files_of_the_page(daemon: Recorder) -> None:
    """Each as what it is, kept by browsers until it changes, and told to run nothing else; nothing beside them."""
    address = address_of(daemon)

    def get(path: str, **headers: str) -> Any:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        return urllib.request.urlopen(urllib.request.Request(f"http://{address}{path}", headers=sent), timeout=20)

    with get("/", Accept="text/html,*/*;q=0.8") as page, get("/", Accept="*/*") as index:
        assert page.headers["Content-Type"].startswith("text/html")
        assert "default-src 'self'" in page.headers["Content-Security-Policy"]
        assert "script-src" not in page.headers["Content-Security-Policy"]
        assert index.read().startswith(b"ingestd\n/metrics")
    for path in FOLDER.iterdir():
        with get(f"/page/{path.name}", Accept_Encoding="gzip") as answer:
            body = answer.read()
            assert (gzip.decompress(body) if answer.headers["Content-Encoding"] else body) == path.read_bytes()
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            etag = answer.headers["ETag"]
        with pytest.raises(urllib.error.HTTPError) as same:
            get(f"/page/{path.name}", If_None_Match=etag)
        with same.value as answered:
            assert answered.status == 304
    plotly = plotly_file()
    assert plotly is not None
    with get("/page/plotly.min.js") as answer:
        assert len(answer.read()) == plotly.stat().st_size
    for nothing in ("/page/page.py", "/page/..%2fdaemon%2fpage.py", "/page/%2e%2e/daemon/page.py", "/page/"):
        with pytest.raises(urllib.error.HTTPError) as missing:
            get(nothing)
        with missing.value as answered:
            assert answered.status == 404


def ask_and_read_nothing(address: str) -> socket.socket:
    """Somebody who watches every channel as often as can be, and takes none of it."""
    host, port = address.split(":")
    caller = socket.socket()
    caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    caller.connect((host, int(port)))
    caller.sendall(f"GET /api/live?seconds=0.05 HTTP/1.1\r\nHost: {address}\r\n\r\n".encode())
    return caller


def resident_bytes(recorder: Recorder) -> int:
    assert recorder.process is not None
    pages = Path(f"/proc/{recorder.process.pid}/statm").read_text().split()[1]
    return int(pages) * 4096


def wide(number: int) -> bytes:
    """Many channels: 200, half of them in every other line."""
    first = number % 2 * 100
    return b" ".join(b"k%d=%d" % (key, number + key) for key in range(first, first + 100)) + b"\n"


def test_who_reads_nothing_is_let_go(tmp_path: Path) -> None:
    """What waits for them is bounded, however much is said; then they are cut off, and others find room."""
    device = Instrument(tmp_path / "ecu", pause_s=0.02, say=wide)
    source = f'[[serial]]\nname = "ecu"\nport = "{device.link}"\nprotocol = "keyvalue"\n'
    recorder = Recorder(
        tmp_path, "postgresql://nobody@127.0.0.1:1/x", source,
        changes="import ingestd.daemon.api as api; api.SLOW_SECONDS_MAX = 4.0",
    )  # fmt: skip
    recorder.start()
    device.start()
    callers: list[socket.socket] = []
    try:
        address = address_of(recorder)
        recorder.wait_for("link up")
        before = resident_bytes(recorder)
        callers += [ask_and_read_nothing(address) for _ in range(CONNECTIONS_MAX - 2)]
        # Each is told 30 kB and more at most ten times a second, which is several hundred kB until it is let go.
        largest, deadline = before, time.monotonic() + SECONDS_MAX
        while "watched no more" not in recorder.log():
            assert time.monotonic() < deadline, "nobody is let go"
            largest = max(largest, resident_bytes(recorder))
            time.sleep(0.1)
        # A message and what a transport takes beyond it, for each; and the decoders' own.
        assert largest - before < 60e6, f"{(largest - before) / 1e6:.0f} MB more"
        assert ask(recorder, "/api/session", method="GET")[0] == 200
        assert "Error" not in recorder.log(), recorder.log()
    finally:
        for caller in callers:
            caller.close()
        device.close()
        recorder.close()


def answers(address: str) -> bool:
    """Whether there is room for one more: those who have gone are noticed within a moment."""
    try:
        with urllib.request.urlopen(address, timeout=SECONDS_MAX) as answer:
            return bool(answer.status == 200)
    except urllib.error.HTTPError as error:
        error.close()
        return False


async def test_many_watchers_harm_nobody(tmp_path: Path, migrated: str) -> None:
    """As many as are let in are all told; one more is told why not; every line is recorded once, and no gap is."""
    device = Instrument(tmp_path / "line", pause_s=0.001)
    recorder = Recorder(tmp_path, migrated, lines_of(device))
    recorder.start()
    try:
        address = await asyncio.to_thread(address_of, recorder)
        recorder.wait_for("link up")
        device.start()

        async def watch() -> int:
            states = 0
            async with watching(recorder, "?seconds=0.05") as messages:
                async for kind, _ in messages:
                    states += kind == "state"
                    if states == 6:
                        return states
            return states

        watchers = [asyncio.create_task(watch()) for _ in range(CONNECTIONS_MAX)]
        await asyncio.sleep(2)
        async with aiohttp.ClientSession() as client, client.get(f"http://{address}/api/live") as refused:
            assert refused.status == 503
            assert "connections are open already" in await refused.text()
        assert await asyncio.gather(*watchers) == [6] * CONNECTIONS_MAX
        sent = await asyncio.to_thread(device.stop)
        ready = f"http://{address}/ready"
        await asyncio.to_thread(wait_until, lambda: answers(ready), "room for another connection")
        await asyncio.to_thread(
            wait_until, lambda: in_metrics(recorder)["line"].committed == sent, "every line in the database"
        )
        log = await asyncio.to_thread(recorder.stop)
        assert "watched no more" in log
        assert "lost" not in log
    finally:
        recorder.close()
        device.close()
    numbers = await asyncio.to_thread(assert_every_number_once, migrated)
    assert len(numbers) == sent


async def test_a_daemon_that_stops_waits_for_no_watcher(daemon: Recorder) -> None:
    """Its watchers are ended with it."""
    async with watching(daemon) as messages:
        await anext(messages)
        begun = time.monotonic()
        stopping = asyncio.create_task(asyncio.to_thread(daemon.stop))
        with contextlib.suppress(aiohttp.ClientPayloadError):  # in the middle of what it had to say
            async for _ in messages:
                pass
        await stopping
        assert time.monotonic() - begun < 20


def test_one_word_that_is_no_text_takes_nothing_from_the_rest() -> None:
    """Such as a path that is not UTF-8, or a number of a kind that JSON does not have."""
    data = {"trouble": "/data/f\udcfcr", "load": np.float64(0.5)}
    said = message("state", data)
    assert said.startswith(b"event: state\ndata: {")
    assert said.count(b"\n") == 3
    assert json.loads(said.splitlines()[1].removeprefix(b"data: ")) == {"trouble": "/data/f\udcfcr", "load": 0.5}
