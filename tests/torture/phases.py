"""`ingestd run` in a process that is killed by SIGKILL in a chosen phase of its work.

    python -m tests.torture.phases AIM WORDS run -c FILE

It is the daemon as it is, with a look-out at the doors of the seven phases. AIM is JSON: the phase, the moment in it
(before, within, after), and at which time it comes by; counted from the first commit of this process on, so that
frames and transactions flow when it dies. Its last words, in the file WORDS, say where it was.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import asyncpg

from ingestd.delivery import sending
from ingestd.journal import journal, log, shelf
from ingestd.store import writer

PHASES = ("append", "sync", "decode", "copy", "update", "commit", "acknowledge")
MOMENTS = ("before", "within", "after")


@dataclass(frozen=True, slots=True)
class Aim:
    """Where a process is to die."""

    phase: str
    moment: str
    countdown: int
    seed: int


@dataclass(frozen=True, slots=True)
class LastWords:
    """Where it died, and what it had done until then."""

    phase: str
    moment: str
    frames: int  # appended by this process
    idle_seconds: float  # since the last of them
    commits: int


class LookOut:
    """Knows what goes on in this process, and ends it when the time has come."""

    def __init__(self, aim: Aim, words: Path) -> None:
        self.aim = aim
        self.random = random.Random(aim.seed)
        self.countdown = aim.countdown
        self.frames = self.commits = 0
        self.frames_at = time.monotonic()
        self.seconds: dict[str, float] = {}  # how long each phase took when it last came by
        self.is_tearing = False  # The next write of this thread is to be torn.
        self._words = os.open(words, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def is_due(self, phase: str) -> bool:
        """A phase begins; whether it is to be the last one."""
        if phase != self.aim.phase or not self.commits:
            return False
        self.countdown -= 1
        return self.countdown == 0

    def delay(self, phase: str) -> float:
        """A random part of how long the phase usually takes."""
        return self.random.random() * self.seconds.get(phase, 0.001)

    def die(self, phase: str, moment: str) -> None:
        """No return from here."""
        words = LastWords(phase, moment, self.frames, time.monotonic() - self.frames_at, self.commits)
        os.write(self._words, json.dumps(asdict(words)).encode() + b"\n")
        os.kill(os.getpid(), signal.SIGKILL)
        signal.pause()


def watch(out: LookOut, owner: Any, name: str, phase: str) -> None:
    """Look out at a function that is called and returns; `within` is a timer's moment, or a write that is torn."""
    original: Callable[..., Any] = getattr(owner, name)
    tears = phase in ("append", "acknowledge")

    def watched(*arguments: Any, **options: Any) -> Any:
        due, moment = out.is_due(phase), out.aim.moment
        if due and moment == "before":
            out.die(phase, moment)
        if due and moment == "within":
            out.is_tearing = tears
            if not tears:
                timer = threading.Timer(out.delay(phase), out.die, (phase, moment))
                timer.daemon = True
                timer.start()
        began = time.monotonic()
        result = original(*arguments, **options)
        out.seconds[phase] = time.monotonic() - began
        if due:
            out.die(phase, "after")
        if phase == "append" and len(arguments[1]):
            out.frames, out.frames_at = out.frames + len(arguments[1]), time.monotonic()
        out.commits += phase == "acknowledge"
        return result

    setattr(owner, name, watched)


def tear_writes(out: LookOut) -> None:
    """A write of which the kernel takes a part only, because the process dies."""
    original = shelf.write_at

    def torn(descriptor: int, data: bytes, offset: int) -> None:
        if out.is_tearing:
            os.pwrite(descriptor, data[: out.random.randrange(len(data) + 1)], offset)
            out.die(out.aim.phase, "within")
        original(descriptor, data, offset)

    shelf.write_at = torn  # type: ignore[attr-defined]


def watch_awaited(out: LookOut, owner: Any, name: str, phase_of: Callable[..., str | None]) -> None:
    """Look out at what waits for the server. Within it means: sent, or on its way, and the answer has not come."""
    original: Callable[..., Awaitable[Any]] = getattr(owner, name)

    async def watched(*arguments: Any, **options: Any) -> Any:
        phase = phase_of(*arguments)
        if phase is None:
            return await original(*arguments, **options)
        due, moment = out.is_due(phase), out.aim.moment
        if due and moment == "before":
            out.die(phase, moment)
        began = time.monotonic()
        asked = asyncio.ensure_future(original(*arguments, **options))
        if due and moment == "within":
            await asyncio.wait([asked], timeout=out.delay(phase))
            out.die(phase, "after" if asked.done() else moment)
        try:
            result = await asked
        except asyncio.CancelledError:
            asked.cancel()
            raise
        out.seconds[phase] = time.monotonic() - began
        if due:
            out.die(phase, "after")
        return result

    setattr(owner, name, watched)


def statement(_: Any, query: str, *__: Any) -> str | None:
    """The phase in which a statement is sent."""
    if query == "COMMIT":
        return "commit"
    return "update" if query.lstrip().startswith("UPDATE feeds") else None


def main() -> None:
    """The daemon, watched."""
    out = LookOut(Aim(**json.loads(sys.argv.pop(1))), Path(sys.argv.pop(1)))
    watch(out, log.Log, "append_frames", "append")
    watch(out, shelf.OpenSegment, "sync", "sync")
    watch(out, sending, "prepare", "decode")
    watch(out, journal.Journal, "acknowledge", "acknowledge")
    tear_writes(out)
    watch_awaited(out, writer, "_copy", lambda *_: "copy")
    watch_awaited(out, asyncpg.Connection, "execute", statement)

    from ingestd.cli import main as ingestd

    ingestd()


if __name__ == "__main__":
    main()
