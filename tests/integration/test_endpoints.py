"""The HTTP side over real sockets: what it answers, and that a port that is taken hurts nobody."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import Callable

import aiohttp
import pytest

from ingestd.config import Address
from ingestd.daemon import endpoints
from ingestd.daemon.endpoints import Endpoints, serve, unready
from ingestd.metrics import JournalNumbers, Snapshot, StoreNumbers
from ingestd.model import Books, Link, SourceStatus

ANY_PORT = Address("127.0.0.1", 0)


class Recorder:
    """What the daemon would be telling about."""

    def __init__(self) -> None:
        self.statuses = {"can0": SourceStatus(Link.OPEN), "gps": SourceStatus(Link.RETRYING, "no such device")}
        self.writable = True
        self.received = 3

    def snapshot(self) -> Snapshot:
        books = {"can0": Books(received=self.received, pending=self.received)}
        return Snapshot(
            "1.2.3", books, self.statuses, JournalNumbers(self.writable, 1, 2), StoreNumbers(up=False),
            {"database": "is away"},
        )  # fmt: skip


async def get(served: Endpoints | None, path: str, **headers: str) -> tuple[int, str, str]:
    """Status, content type and body."""
    assert served is not None
    assert served.address is not None
    host = f"[{served.address.host}]" if ":" in served.address.host else served.address.host or "127.0.0.1"
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as client,
        client.get(f"http://{host}:{served.address.port}{path}", headers=headers) as answer,
    ):
        return answer.status, answer.headers["Content-Type"], await answer.text()


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that another task does."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_what_is_served() -> None:
    """Metrics of the moment in both formats, health, an index; nothing else, and nothing to write to."""
    recorder = Recorder()
    async with serve(ANY_PORT, recorder.snapshot) as served:
        assert served is not None
        assert served.address is not None
        assert served.address.port > 0
        status, kind, body = await get(served, "/metrics")
        assert (status, kind.partition(";")[0]) == (200, "text/plain")
        assert 'ingestd_frames_received_total{source="can0"} 3.0' in body
        recorder.received = 4
        _, kind, body = await get(served, "/metrics", Accept="application/openmetrics-text; version=1.0.0")
        assert kind.startswith("application/openmetrics-text")
        assert 'ingestd_frames_received_total{source="can0"} 4.0' in body
        assert (await get(served, "/health"))[::2] == (200, "ok\n")
        status, _, index = await get(served, "/")
        assert status == 200
        assert all(path in index for path in ("/metrics", "/health", "/ready"))
        assert (await get(served, "/nothing"))[0] == 404
        async with aiohttp.ClientSession() as client, client.post(f"http://{served.address}/metrics") as refused:
            assert refused.status == 405


async def test_ready_names_what_is_not() -> None:
    """A source that waits for its device is ready, one that has not looked yet is not, nor a journal that is stuck.

    A database that is away is said, and keeps nobody from being ready.
    """
    recorder = Recorder()
    async with serve(ANY_PORT, recorder.snapshot) as served:
        status, kind, body = await get(served, "/ready")
        assert (status, kind.partition(";")[0]) == (200, "application/json")
        assert json.loads(body) == {
            "ready": True,
            "unready": {},
            "trouble": {"database": "is away"},
            "sources": {"can0": {"link": "open"}, "gps": {"link": "retrying", "reason": "no such device"}},
        }
        recorder.statuses["can0"] = SourceStatus(Link.OPENING)
        status, _, body = await get(served, "/ready")
        assert (status, set(json.loads(body)["unready"])) == (503, {"can0"})
        recorder.writable = False
        status, _, body = await get(served, "/ready")
        assert (status, set(json.loads(body)["unready"])) == (503, {"can0", "journal"})
        assert (await get(served, "/health"))[0] == 200
    assert set(unready(recorder.snapshot())) == {"can0", "journal"}


async def test_the_daemon_may_know_more() -> None:
    """What it says itself decides, instead of the snapshot."""
    recorder = Recorder()
    async with serve(ANY_PORT, recorder.snapshot, lambda: {"journal": "is being opened"}) as served:
        status, _, body = await get(served, "/ready")
        assert (status, json.loads(body)["unready"]) == (503, {"journal": "is being opened"})


async def test_a_snapshot_that_fails_is_one_bad_answer(caplog: pytest.LogCaptureFixture) -> None:
    """A defect there is a 500 and a line in the log; the next question is answered."""
    recorder = Recorder()
    async with serve(ANY_PORT, recorder.snapshot) as served:
        statuses, recorder.statuses = recorder.statuses, None  # type: ignore[assignment]
        assert (await get(served, "/metrics"))[0] == 500
        assert "Error handling request" in caplog.text
        recorder.statuses = statuses
        assert (await get(served, "/metrics"))[0] == 200


async def test_a_port_that_is_taken_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever serves goes on at once; it is said once, with what to do; when the port is free it is used."""
    monkeypatch.setattr(endpoints, "RETRY_SECONDS_MIN", 0.01)
    monkeypatch.setattr(endpoints, "RETRY_SECONDS_MAX", 0.02)
    caplog.set_level(logging.INFO)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = Address("127.0.0.1", other.getsockname()[1])
        async with serve(address, Recorder().snapshot) as served:
            assert served is not None
            assert served.address is None
            await asyncio.sleep(0.1)  # several attempts
            warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
            assert len(warnings) == 1
            assert str(address) in warnings[0]
            assert "another program listens there" in warnings[0]
            other.close()
            await until(lambda: served.address is not None)
            assert served.address == address
            assert (await get(served, "/health"))[0] == 200


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid", "a" * 70 + ".example"])
async def test_an_address_that_is_not_ours(host: str, caplog: pytest.LogCaptureFixture) -> None:
    """It may come up later: said, and no reason to stop; leaving does not wait for it."""
    async with serve(Address(host, 9464), Recorder().snapshot) as served:
        assert served is not None
        await until(lambda: "cannot listen" in caplog.text)
        assert served.address is None
        assert "not yet" in repr(served)


async def test_off() -> None:
    """Nothing is served, and nothing is asked for."""
    async with serve(None, lambda: pytest.fail("nobody asked")) as served:
        assert served is None


async def test_every_address_of_the_machine() -> None:
    """An empty host listens on all of them."""
    async with serve(Address("", 0), Recorder().snapshot) as served:
        assert (await get(served, "/health"))[0] == 200


async def test_leaving_frees_the_port_whoever_is_connected() -> None:
    """A client that keeps its connection open does not hold up the end, and the next daemon gets the port."""
    async with serve(ANY_PORT, Recorder().snapshot) as served:
        assert served is not None
        assert served.address is not None
        reader, writer = await asyncio.open_connection(served.address.host, served.address.port)
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        address = served.address
    async with asyncio.timeout(10):
        await reader.read()
    writer.close()
    async with serve(address, Recorder().snapshot) as again:
        assert again is not None
        assert again.address == address
