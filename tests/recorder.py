"""A daemon under test: its configuration, its process, its devices, and what the journal and SQL hold afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import pty
import signal
import subprocess
import sys
import threading
import time
import tty
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import asyncpg

from ingestd.journal import Kind, Record
from ingestd.journal.inspection import settled_items
from ingestd.journal.record import any_set
from ingestd.journal.segment import list_folder

SECONDS_MAX = 60.0

# The daemon with something in it changed first.
CHANGED = """
import sys
exec(sys.argv.pop(1))
from ingestd.cli import main
if __name__ == "__main__":
    main()
"""
# As on another machine; the id of the machine it runs on is the system's.
OTHER_MACHINE = "import ingestd.daemon.service as service; service.machine_id = lambda: {!r}"

# With segments that last a second, not an hour.
SMALL_SEGMENTS = """
import functools
import ingestd.daemon.service as service
service.Journal.open = functools.partial(service.Journal.open, segment_bytes=65536)
"""


class Instrument:
    """A serial device that says a numbered line again and again, on a pty behind a link as udev would make it.

    `filler` follows the number in each line; `say` makes something else of a number.
    """

    def __init__(
        self, link: Path, pause_s: float = 0.002, filler: bytes = b"", say: Callable[[int], bytes] | None = None
    ) -> None:
        self.link = link
        self.pause_s = pause_s
        self.say = say or (lambda number: b"n=%d%s\n" % (number, filler))
        self.sent = 0
        self.sent_at = 0.0  # by time.monotonic
        self._master, self._slave = pty.openpty()
        tty.setraw(self._slave)
        os.set_blocking(self._master, False)
        link.unlink(missing_ok=True)
        link.symlink_to(os.ttyname(self._slave))
        self._stop = threading.Event()
        self._give_up_at = 0.0
        self._thread = threading.Thread(target=self._talk, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _talk(self) -> None:
        for number in itertools.count():
            line = whole = self.say(number)
            while line:
                # A line that is begun is ended, for somebody may have read its number; unless nobody reads any more.
                if self._stop.is_set() and (len(line) == len(whole) or time.monotonic() > self._give_up_at):
                    return
                with contextlib.suppress(BlockingIOError):
                    line = line[os.write(self._master, line) :]
                if line:
                    time.sleep(0.01)  # Nobody reads: on a real wire it would be lost; here it waits.
            self.sent, self.sent_at = number + 1, time.monotonic()
            if self._stop.wait(self.pause_s):
                return

    def stop(self) -> int:
        """How many lines were sent in all."""
        self._give_up_at = time.monotonic() + 1.0
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(SECONDS_MAX)
        return self.sent

    def close(self) -> None:
        self.stop()
        self.link.unlink(missing_ok=True)  # The number of its terminal may be another's soon.
        os.close(self._master)
        os.close(self._slave)


def lines_of(instrument: Instrument, name: str = "line") -> str:
    """The instrument in a configuration."""
    return f'[[serial]]\nname = "{name}"\nport = "{instrument.link}"\nprotocol = "lines"\n'


class Recorder:
    """`ingestd run` in a process of its own, with a journal that outlives it.

    `changes` is Python that the process runs first: for faults that cannot be produced, and limits too long for a test.
    """

    def __init__(
        self,
        folder: Path,
        dsn: str,
        sources: str,
        *,
        settings: str = "",
        journal: str = "",
        machine: str = "",
        changes: str = "",
        disk: Path | None = None,
    ) -> None:
        self.folder = folder
        self.changes = OTHER_MACHINE.format(machine) if machine else changes
        self.begun = 0  # where in the log the last start is
        self.journal = (disk or folder) / "journal"
        self.config = folder / "ingestd.toml"
        self.log_path = folder / "log"
        self.config.write_text(
            f'[database]\ndsn = "{dsn}"\n[journal]\npath = "{self.journal}"\n{journal}\n[batch]\ninterval = "100ms"\n'
            f'[http]\nlisten = "127.0.0.1:0"\n{settings}\n{sources}\n'
        )
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *program: str) -> None:
        """Start it, or a `program` (arguments of Python) that is it and more."""
        if not program:
            program = ("-c", CHANGED, self.changes) if self.changes else ("-m", "ingestd")
        command = [sys.executable, *program, "run", "-c", str(self.config)]
        self.begun = len(self.log())
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)

    def log(self) -> str:
        return self.log_path.read_text() if self.log_path.exists() else ""

    def wait_for(self, text: str, *, after: int = 0, seconds: float = SECONDS_MAX) -> None:
        """Until the log says something."""
        wait_until(lambda: text in self.log()[after:], f"{text!r} in the log", seconds, self.log)

    def stop(self) -> str:
        """SIGTERM, and what the log says of the whole run."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(SECONDS_MAX) == 0, self.log()[-10_000:]
        self.process = None
        return self.log()

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self.process = None

    def close(self) -> None:
        if self.process is not None:
            self.kill()

    def journalled(self) -> Counter[tuple[str, int, str]]:
        """Source, stamp and payload of every frame in the journal."""
        found: Counter[tuple[str, int, str]] = Counter()
        for path in (name.path for name in list_folder(self.journal)[0] if name.number and not name.rejected):
            try:
                items = settled_items(path)
            except FileNotFoundError:
                continue  # A daemon that starts removes what the one before had allocated and not used.
            if items and not isinstance(items[-1], Record):
                items.pop()  # the torn end that a kill leaves
            for record in items:
                if not isinstance(record, Record) and not any_set(record.data):
                    continue  # Somebody has cut the file while it was written.
                assert isinstance(record, Record), f"damage: {record}"
                found.update(frames_of(record))
        return found


def wait_until(
    condition: Callable[[], bool], what: str, seconds: float = SECONDS_MAX, more: Callable[[], str] = str
) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {seconds} s\n{more()}"
        time.sleep(0.02)


def frames_of(record: Record) -> list[tuple[str, int, str]]:
    """The frames of a record, as `stored` gives them."""
    if record.kind is not Kind.FRAMES:
        return []
    frames = record.frames()
    rows = zip(frames.ts_ns.tolist(), frames.length.tolist(), frames.data, strict=True)
    return [(frames.source, ts_ns, bytes(data[:length]).hex()) for ts_ns, length, data in rows]


def stored(dsn: str) -> Counter[tuple[str, int, str]]:
    """Source, stamp and payload of every frame in SQL."""

    async def fetch() -> list[asyncpg.Record]:
        connection = await asyncpg.connect(dsn)
        try:
            return await connection.fetch(
                "SELECT payload_json ->> 'source', ts_mono_ns, coalesce(payload_json ->> 'data',"
                " encode(convert_to(payload_json ->> 'text', 'UTF8'), 'hex')) FROM frames"
            )
        finally:
            await connection.close()

    return Counter(tuple(row) for row in asyncio.run(fetch()))
