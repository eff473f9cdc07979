"""The fault campaign: a daemon that records is killed hundreds of times, while everything around it fails, too.

A round is one journal, one database, three instruments and some twenty lives of a daemon. Most lives end by SIGKILL in
a chosen phase of the daemon's work (phases.py), the rest at any moment; blows (blows.py) hit the database, the network
and the disk meanwhile. At the end of a round all is mended, a daemon sends what is there, and everything that can be
compared is: the books, the journal, SQL, and what the instruments have said, number by number (tests/books.py).
"""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import asyncpg

from ingestd.journal import Kind
from tests.books import assert_books, in_metrics, journal_records, newest_segment
from tests.recorder import Recorder, wait_until
from tests.torture.blows import Scene, blows_of, mend, small_disk
from tests.torture.instruments import UNITS_PER_DEGREE, Instruments, number_in
from tests.torture.phases import MOMENTS, PHASES
from tests.torture.proxy import Proxy
from tests.torture.server import Server

LIFE_SECONDS_MAX = 8.0  # A phase that has not come by then does not come: the daemon is killed where it is.
IDLE_SECONDS_MAX = 1.0  # Traffic flows: this long ago at most, at a kill, the daemon had the last frame.
ANYWHERE = "anywhere"  # kills at a moment that only the dice know
COUNTDOWN_MAX = {"append": 300, "sync": 15, "decode": 8, "copy": 16, "update": 8, "commit": 8, "acknowledge": 8}


@dataclass
class Tally:
    """What has happened so far."""

    kills: Counter[str] = field(default_factory=Counter)  # by phase
    moments: Counter[tuple[str, str]] = field(default_factory=Counter)
    blows: Counter[str] = field(default_factory=Counter)
    rounds: int = 0
    frames: int = 0  # that SQL and the journal had in the end, each once
    dropped: Counter[str] = field(default_factory=Counter)  # by reason
    without_traffic: int = 0  # lives that were ended before they had recorded anything; not among the kills

    def next_phase(self, dice: random.Random) -> str:
        """One of those with the fewest kills."""
        fewest = min(self.kills[phase] for phase in PHASES)
        return dice.choice([phase for phase in PHASES if self.kills[phase] == fewest])

    def report(self) -> str:
        """For people."""
        total = self.kills.total()
        lines = [f"{total} kills in {self.rounds} rounds, each with traffic; by phase (before / within / after):"]
        for phase in (*PHASES, ANYWHERE):
            moments = " / ".join(str(self.moments[phase, moment]) for moment in MOMENTS)
            lines.append(f"  {phase:12} {self.kills[phase]:4}" + (f"   {moments}" if phase in PHASES else ""))
        lines.append(f"{self.without_traffic} more processes killed before they had recorded anything")
        lines.append(
            f"{self.blows.total()} blows: " + ", ".join(f"{n} {name}" for name, n in sorted(self.blows.items()))
        )
        lines.append(
            f"{self.frames} frames, each in SQL exactly once, equal to the journal's, with the numbers that were said;"
            f" dropped and counted: {dict(self.dropped) or 'none'}"
        )
        return "\n".join(lines)


class Round:
    """One journal and what happens to it."""

    def __init__(self, folder: Path, server: Server, dice: random.Random, tally: Tally, number: int) -> None:
        self.folder, self.server, self.random, self.tally = folder, server, dice, tally
        self.name = f"round_{number}"
        self._words = folder / "words"
        self._disk_is_large = True

    def run(self, lives: int, is_over: Callable[[], bool]) -> None:
        """Live and die so often, then look at what is left. Raises AssertionError."""
        self.server.create(self.name)
        with ExitStack() as stack:
            proxy = Proxy(self.server.socket)
            stack.callback(proxy.close)
            instruments = Instruments(self.folder)
            stack.callback(instruments.close)
            scene = Scene(self.server, proxy, self.name, self.random)
            if self.random.random() < 0.3:
                scene.disk = stack.enter_context(small_disk(self.folder))
            self._disk_is_large = scene.disk is None
            dsn = f"postgresql://postgres@127.0.0.1:{proxy.port}/{self.name}?sslmode=disable"
            recorder = Recorder(self.folder, dsn, instruments.configuration(), disk=scene.disk)
            stack.callback(recorder.close)
            stack.callback(mend, scene)
            instruments.start()
            for _ in range(lives):
                if is_over():
                    break
                self._live(recorder, scene, instruments)
            self._look(recorder, scene, instruments)
        self.tally.rounds += 1
        self.server.drop(self.name)

    def _live(self, recorder: Recorder, scene: Scene, instruments: Instruments) -> None:
        """One process, from its start to its SIGKILL."""
        begun, newest = time.monotonic(), newest_segment(recorder.journal)
        is_aimed = self.random.random() < 0.75
        if is_aimed:
            phase = self.tally.next_phase(self.random)
            aim = {
                "phase": phase,
                "moment": self.random.choice(MOMENTS),
                "countdown": self.random.randint(1, COUNTDOWN_MAX[phase]),
                "seed": self.random.getrandbits(32),
            }
            recorder.start("-m", "tests.torture.phases", json.dumps(aim), str(self._words))
            patience = LIFE_SECONDS_MAX
        else:
            recorder.start()
            patience = self.random.uniform(0.2, 4.0)
        process = recorder.process
        assert process is not None
        scene.pid = process.pid
        for _ in range(self.random.choice((0, 1, 1, 2, 2))):
            if ended(process, self.random.uniform(0.0, 1.5)):
                break
            blow = self.random.choice(blows_of(scene))
            self.server.start()  # The one before may have stopped it.
            blow(scene)
            self.tally.blows[blow.__name__] += 1
            ended(process, self.random.uniform(0.0, 1.0))
            if self.random.random() < 0.7:
                mend(scene)
        if not ended(process, max(0.0, begun + patience - time.monotonic())) and is_aimed:
            mend(scene)  # Whatever it waits for is there now.
            ended(process, LIFE_SECONDS_MAX / 2)
        self._note(process, recorder, instruments, newest)
        mend(scene)

    def _note(
        self, process: subprocess.Popen[bytes], recorder: Recorder, instruments: Instruments, newest: int
    ) -> None:
        """It is dead, or dies now; where, whether anything was going on, and whether all that it had is there.

        `newest` is the segment before its first.
        """
        if process.poll() is None:
            idle = time.monotonic() - max(each.sent_at for each in instruments.all.values())
            recorder.kill()
            is_recording = "listening http" in recorder.log()[recorder.begun :] and idle < IDLE_SECONDS_MAX
            self.tally.kills[ANYWHERE] += is_recording
            self.tally.without_traffic += not is_recording
            return
        recorder.process = None
        assert process.returncode == -9, f"it ended by itself: {process.returncode}\n{recorder.log()[recorder.begun :]}"
        words = json.loads(self._words.read_text().splitlines()[-1])
        assert words["commits"], words
        assert words["frames"], words
        assert words["idle_seconds"] < IDLE_SECONDS_MAX, words
        if self._disk_is_large:
            records = journal_records(recorder.journal, Kind.FRAMES, after=newest)
            there = sum(record.frames_count for record in records)
            assert there >= words["frames"], f"{there} frames are in the journal: {words}"
        self.tally.kills[words["phase"]] += 1
        self.tally.moments[words["phase"], words["moment"]] += 1

    def _look(self, recorder: Recorder, scene: Scene, instruments: Instruments) -> None:
        """Let a daemon end its work in peace, and compare everything with everything."""
        mend(scene)
        recorder.start()
        recorder.wait_for("listening http", after=recorder.begun)
        before = in_metrics(recorder)
        wait_until(
            lambda: all(
                said.received > before[name].received if name in before else said.received
                for name, said in in_metrics(recorder).items()
            ),
            "frames of every source",
            more=recorder.log,
        )
        sent = instruments.stop()
        dsn = self.server.dsn(self.name)
        books = assert_books(recorder, dsn, sent, number=number_in)
        for said in books.values():
            self.tally.frames += said.committed
            self.tally.dropped.update(said.dropped)
            assert not said.dropped or not self._disk_is_large, books
        assert not any(said.rejected for said in books.values()), books
        asyncio.run(assert_values(dsn))


def ended(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether a process ends within so many seconds."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


async def assert_values(dsn: str) -> None:
    """Every frame of the bus and of the receiver is there as signals, too, at its instant and with its number."""
    connection = await asyncpg.connect(dsn)
    try:
        for group, channel, scale in (("can0", "Counter.Number", 1), ("gps/GP", "GLL.lat", UNITS_PER_DEGREE)):
            source = group.partition("/")[0]
            frames = await connection.fetch(
                "SELECT ts_mono_ns, coalesce(decode(payload_json ->> 'data', 'hex'),"
                " convert_to(payload_json ->> 'text', 'UTF8')) FROM frames WHERE payload_json ->> 'source' = $1",
                source,
            )
            signals = await connection.fetch(
                "SELECT ts_mono_ns, value_num FROM signals WHERE source = $1 AND channel = $2", group, channel
            )
            numbers = {(at_ns, number_in(payload)) for at_ns, payload in frames}
            if source == "can0":  # What the signal says is the digits taken as a binary number, in a double.
                numbers = {(at_ns, int(float(int(str(number), 16)))) for at_ns, number in numbers}
            assert len(signals) == len(frames), f"{len(signals)} signals of {len(frames)} frames of {source}"
            assert {(at_ns, round(value * scale)) for at_ns, value in signals} == numbers, source
    finally:
        await connection.close()


def run(server: Server, *, seed: int, kills: int, seconds: float, lives: int, say: Callable[[str], None]) -> Tally:
    """Rounds, until there were so many kills or the time is over. Raises AssertionError at the first thing wrong."""
    dice, tally = random.Random(seed), Tally()
    end = time.monotonic() + seconds

    def is_over() -> bool:
        return time.monotonic() > end or tally.kills.total() >= kills

    while not is_over():
        number = tally.rounds + 1
        folder = Path(tempfile.mkdtemp(prefix="ingestd-torture-"))
        try:
            Round(folder, server, dice, tally, number).run(lives, is_over)
        except BaseException:
            say(f"round {number} of seed {seed} failed; its log and its journal are in {folder}")
            raise
        shutil.rmtree(folder)
        say(f"round {number}: {tally.kills.total()} kills, {tally.blows.total()} blows, {tally.frames} frames so far")
    return tally
