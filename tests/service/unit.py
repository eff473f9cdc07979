"""ingestd.service under test, in the shape of `tests.recorder.Recorder`, so that its books can be compared as there."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.can_bus.bus import Bus
from tests.recorder import SECONDS_MAX, Instrument, Recorder, lines_of

STATE = Path("/var/lib/ingestd")
CONFIGURATION = Path("/etc/ingestd/ingestd.toml")
DSN = Path("/etc/ingestd/ingestd.dsn")
NAME = "ingestd.service"


def systemctl(*arguments: str, exit_code: int | None = 0) -> str:
    """What it says; it has to end with `exit_code`, if one is given."""
    done = subprocess.run(["systemctl", *arguments], capture_output=True, text=True, timeout=180)
    assert exit_code in (None, done.returncode), (arguments, done.returncode, done.stdout, done.stderr)
    return (done.stdout + done.stderr).strip()


def until(condition: Callable[[], bool], what: str, more: Callable[[], str] = str) -> None:
    """Wait; asking takes a process each time, and there is one processor for it and for what is asked about."""
    deadline = time.monotonic() + SECONDS_MAX
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {SECONDS_MAX} s\n{more()}"
        time.sleep(0.25)


def journalctl(*arguments: str) -> str:
    """What it says; it ends with 1 where there is nothing."""
    return subprocess.run(["journalctl", "--no-pager", *arguments], capture_output=True, text=True, timeout=60).stdout


class Unit(Recorder):
    """The service. Its log is what journald has of it."""

    def __init__(self, dsn: str, line: Instrument, bus: Bus, name: str = NAME) -> None:
        self.name = name
        self.config, self.journal = CONFIGURATION, STATE / "journal"
        self.begun = 0
        systemctl("stop", self.name)
        self._cursor = journalctl("--lines=0", "--show-cursor").rpartition("-- cursor: ")[2].strip()
        shutil.rmtree(STATE, ignore_errors=True)
        self.sources = lines_of(line) + f'[[can]]\nname = "bus"\nchannel = "{bus.channel}"\n'
        self.configure(self.sources)
        DSN.write_text(f"{dsn}\n")
        DSN.chmod(0o600)

    def configure(self, sources: str, settings: str = "") -> None:
        """Write the configuration."""
        batch = '[batch]\ninterval = "100ms"\n[http]\nlisten = "127.0.0.1:0"\n'
        self.config.write_text(f"{batch}{settings}\n{sources}")

    def start(self, *_: str) -> None:
        """Start it, and wait until it is ready."""
        self.begun = len(self.log())
        systemctl("start", self.name, exit_code=None)
        assert self.show("ActiveState") == "active", self.log()

    @property
    def process(self) -> int | None:  # type: ignore[override]
        """Its main process, while it runs."""
        return int(self.show("MainPID")) or None

    def show(self, what: str) -> str:
        """A property of the unit."""
        return systemctl("show", self.name, "--property", what, "--value")

    def has(self, what: str, value: str) -> None:
        """Until a property contains something."""
        until(lambda: value in self.show(what), f"{value!r} in {what}", lambda: self.show(what) + "\n" + self.log())

    def says(self, text: str) -> None:
        """Until the log has it."""
        until(lambda: text in self.log(), f"{text!r} in the log", self.log)

    def log(self) -> str:
        """What it has said since this was made."""
        return journalctl("--unit", self.name, "--output", "cat", "--after-cursor", self._cursor)

    def stop(self) -> str:
        """As an operator does, and what the log says."""
        systemctl("stop", self.name)
        assert (self.show("ActiveState"), self.show("Result")) == ("inactive", "success"), self.log()
        return self.log()

    def is_back(self, before: int | None) -> None:
        """Until another process than before runs and is ready."""
        until(lambda: self.process not in (before, None), "new process", self.log)
        self.has("ActiveState", "active")
        self.begun = self.log().rindex("recording session=")

    def close(self) -> None:
        systemctl("stop", self.name)
        systemctl("reset-failed", self.name, exit_code=None)
