"""The latest value of every channel, for people who watch: `ingestd tail`, the page, the demo.

Frames go into the journal first, as always; here they are decoded a second time, and only while somebody watches. That
takes nothing from recording: what comes faster than it can be decoded is left out here, and a watcher who reads slowly
gets the newest values, never a backlog. Every sample is in the database; this is a window to look through.
"""

from __future__ import annotations

import asyncio
import contextlib
import fnmatch
import logging
import math
import re
from collections import deque
from collections.abc import AsyncGenerator, Callable
from copy import deepcopy
from functools import lru_cache
from typing import Final, NamedTuple

import numpy as np

from ingestd.decode.keyed import SPARSE
from ingestd.model import Channel, Clock, FrameBatch, Memory, Quality, SignalBatch
from ingestd.pipeline import Decoders

log = logging.getLogger(__name__)

DECODE_SECONDS: Final = 0.1  # how often what has come is decoded
QUIET_SECONDS: Final = 5.0  # after which a watcher is told that nothing has changed
FRAMES_WAITING_MAX: Final = 50_000


class Value(NamedTuple):
    """A channel's newest sample. `samples` is how many there were since somebody began to watch.

    `minimum` and `maximum` are those of the numbers since the watcher was told last: what is looked at now and then
    shows peaks all the same.
    """

    source: str
    channel: str
    ts_mono_ns: int
    ts_utc_ns: int
    number: float | None
    text: str | None
    unit: str | None
    quality: int
    samples: int
    minimum: float | None = None
    maximum: float | None = None

    def as_json(self) -> dict[str, str | int | float | None]:
        """For programs. JSON has no infinity: that is none, with the quality that it has."""
        return {
            "ts_utc": utc(self.ts_utc_ns), "ts_mono_ns": self.ts_mono_ns, "source": self.source,
            "channel": self.channel, "value_num": _finite(self.number), "value_text": self.text, "unit": self.unit,
            "quality": self.quality, "samples": self.samples, "minimum": _finite(self.minimum),
            "maximum": _finite(self.maximum),
        }  # fmt: skip

    def spanning(self, before: Value | None) -> Value:
        """This one, with the minimum and maximum of both."""
        if before is None:
            return self
        low = [each for each in (before.minimum, self.minimum) if each is not None]
        high = [each for each in (before.maximum, self.maximum) if each is not None]
        return self._replace(minimum=min(low, default=None), maximum=max(high, default=None))


def utc(ts_ns: int) -> str:
    """An instant in ISO 8601, to the nanosecond."""
    return str(np.datetime64(ts_ns, "ns")) + "Z"


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None


class Live:
    """What is shown. `decoders` gives those in force, or None while there are none yet."""

    def __init__(self, decoders: Callable[[], Decoders | None]) -> None:
        self.frames_left_out = 0
        self._decoders_in_force = decoders
        self._in_force: Decoders | None = None
        self._noting: Decoders | None = None  # like those in force, for the loop
        self._remembering: frozenset[str] = frozenset()
        self._memory: dict[str, Memory] = {}  # what decoders remember, of a CSV log its header
        self._waiting: deque[tuple[FrameBatch, Clock]] = deque()
        self._waiting_count = 0
        self._values: dict[tuple[str, str], Value] = {}
        self._decoded = asyncio.Condition()
        self._watchers: list[dict[tuple[str, str], Value]] = []  # for each, what has changed since it was told
        self._task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Live: {len(self._watchers)} watchers, {len(self._values)} channels>"

    @property
    def channels(self) -> int:
        """How many have had a value since somebody began to watch."""
        return len(self._values)

    def frames(self, batch: FrameBatch, clock: Clock) -> None:
        """Frames that are in the journal. Called for each batch; costs nothing while nobody watches.

        But for sources that nobody can read without what came before, such as the header of a CSV log: a look at each.
        """
        self._note(batch)
        if not self._watchers:
            return
        self._waiting.append((batch, clock))
        self._waiting_count += len(batch)
        while self._waiting_count > FRAMES_WAITING_MAX and len(self._waiting) > 1:
            gone, _ = self._waiting.popleft()
            self._waiting_count -= len(gone)
            self.frames_left_out += len(gone)

    def _note(self, batch: FrameBatch) -> None:
        if (in_force := self._decoders_in_force()) is None:
            return
        with contextlib.suppress(Exception):  # Nothing that goes wrong here stops a recording.
            if in_force is not self._in_force:
                self._in_force, self._noting = in_force, in_force.anew()
                self._remembering = self._noting.dependent
            if batch.source in self._remembering and self._noting is not None:
                self._noting.remember(batch, self._memory.setdefault(batch.source, {}))

    async def watch(
        self, pattern: str, seconds: float, quiet_seconds: float = QUIET_SECONDS
    ) -> AsyncGenerator[list[Value]]:
        """What has changed of the channels that match, at most once in so many seconds; the first time, all there is.

        Nothing, after `quiet_seconds`, where nothing changes: so a watcher knows that somebody is there.
        `pattern` is of the shell's kind, of `source/channel`; without `*` or `?` it may stand anywhere in that.
        """
        news = dict(self._values)
        self._watchers.append(news)
        if self._task is None:
            self._task = asyncio.create_task(self._decode(), name="live")
            self._task.add_done_callback(_say_failure)
        try:
            while True:
                async with self._decoded:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(quiet_seconds):
                            while not news:
                                await self._decoded.wait()
                    changed = [value for key, value in news.items() if matches(pattern, *key)]
                    news.clear()
                yield changed
                await asyncio.sleep(seconds)
        finally:
            self._watchers = [each for each in self._watchers if each is not news]
            if not self._watchers:
                await self._end()

    async def _end(self) -> None:
        """Nobody watches any more."""
        log.info("watched no more")
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        self._waiting.clear()
        self._values.clear()
        self._waiting_count = self.frames_left_out = 0

    async def _decode(self) -> None:
        # Of this task alone: a thread that was at work when the last watcher went may not have ended yet.
        memory, in_force, decoders = deepcopy(self._memory), None, None
        while True:
            await asyncio.sleep(DECODE_SECONDS)
            if not self._waiting or (now_in_force := self._decoders_in_force()) is None:
                continue
            if decoders is None or now_in_force is not in_force:
                in_force, decoders = now_in_force, now_in_force.anew()
            waiting, self._waiting, self._waiting_count = self._waiting, deque(), 0
            newest = await asyncio.to_thread(_newest, waiting, decoders, memory)
            for key, value in newest.items():
                before = self._values.get(key)
                samples = value.samples + (0 if before is None else before.samples)
                self._values[key] = newest[key] = value._replace(samples=samples)
            for news in tuple(self._watchers):
                news |= {key: value.spanning(news.get(key)) for key, value in newest.items()}
                await asyncio.sleep(0)  # Reading the buses comes first, however many watch.
            async with self._decoded:
                self._decoded.notify_all()


def _say_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.error("values are shown no more until all who watch have gone", exc_info=task.exception())


def _newest(
    waiting: deque[tuple[FrameBatch, Clock]], decoders: Decoders, memory: dict[str, Memory]
) -> dict[tuple[str, str], Value]:
    """The newest sample of every channel in frames; for a thread."""
    newest: dict[tuple[str, str], Value] = {}
    for batch, clock in waiting:
        with contextlib.suppress(Exception):  # Delivery meets the same frames, and says what is wrong with them.
            decoder = decoders.of(batch.source)
            for signals in decoder.decode(batch, memory.setdefault(batch.source, {})).batches:
                _take(signals, clock, newest)
    return newest


def matches(pattern: str, source: str, channel: str) -> bool:
    """Whether a channel is among those that somebody wants to see. Case is no matter."""
    return _compiled(pattern.lower()).match(f"{source}/{channel}".lower()) is not None


@lru_cache(maxsize=256)  # fnmatch itself would keep thousands, whoever sends them.
def _compiled(wanted: str) -> re.Pattern[str]:
    return re.compile(fnmatch.translate(wanted if set(wanted) & set("*?[") else f"*{wanted}*"))


def _take(signals: SignalBatch, clock: Clock, newest: dict[tuple[str, str], Value]) -> None:
    if not len(signals):
        return
    group = signals.group
    low, high = np.fmin.reduce(signals.value, axis=1).tolist(), np.fmax.reduce(signals.value, axis=1).tolist()
    for row, channel in enumerate(group.channels):
        key = group.source, channel.name
        at, count = len(signals) - 1, len(signals)
        if group.name in SPARSE and signals.quality is not None:
            there = np.flatnonzero(signals.quality[row] & Quality.NOT_AVAILABLE == 0)
            if not len(there):
                continue  # Other keys have come, or null has: the two cannot be told apart here.
            at, count = int(there[-1]), len(there)
        ts_ns = int(signals.ts_ns[at])
        before = newest.get(key)
        samples = count + (0 if before is None else before.samples)
        number = float(signals.value[row, at])
        text = None if signals.text is None else signals.text[row, at]
        value = Value(
            group.source, channel.name, ts_ns, ts_ns + clock.utc_offset_ns,
            _number(number), _label(channel, number) if text is None else text, channel.unit,
            0 if signals.quality is None else int(signals.quality[row, at]), samples,
            _number(low[row]), _number(high[row]),
        )  # fmt: skip
        if before is not None and before.ts_mono_ns > ts_ns:
            newest[key] = before._replace(samples=samples).spanning(value)
        else:
            newest[key] = value.spanning(before)


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _label(channel: Channel, number: float) -> str | None:
    """What the signal database calls the value, if it has a name for it."""
    if not channel.choices or not math.isfinite(number):
        return None
    return channel.choices.get(str(int(number)) if number.is_integer() else repr(number))
