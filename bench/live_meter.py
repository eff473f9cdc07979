"""How much processor time the guest and each process in it use, as the host's kernel counts it.

The guest's own figures are of no use: a user-mode kernel counts in ticks of 10 ms, and a process that wakes by a timer
and sleeps again before the next tick is charged nothing (a loop of 3 ms work every 20 ms: 0.0 s where 0.6 s were used).
On the host a guest is a few processes: its kernel, and one for each address space in it, which runs the user code.
Their times are exact to the nanosecond. What a program costs is therefore what the whole guest uses with it, less what
it uses without it; the user part of each of its processes is known by itself.

The guest asks by a file, the host answers by a file, in a folder both see.
"""

from __future__ import annotations

import json
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

POLL_SECONDS = 0.005
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Reading:
    """Processor time since the guest's start, in nanoseconds."""

    at_ns: int  # of the guest's CLOCK_MONOTONIC
    all_ns: int
    spaces_ns: dict[int, int]  # of the guest's address spaces, by the host's process id, in order of age

    def newer_than(self, before: Reading) -> list[int]:
        """Address spaces that were not there before, the oldest first."""
        return sorted(set(self.spaces_ns) - set(before.spaces_ns))

    def of(self, spaces: list[int]) -> int:
        """What these address spaces used."""
        return sum(self.spaces_ns.get(space, 0) for space in spaces)


class Answering(threading.Thread):
    """The host's side. `parent` is the process that starts the guest."""

    def __init__(self, folder: Path, parent: int) -> None:
        super().__init__(daemon=True)
        self._folder, self._parent = folder, parent
        self._stop = threading.Event()

    def run(self) -> None:
        number = 0
        while not self._stop.wait(POLL_SECONDS):
            if (self._folder / f"ask.{number}").exists():
                text = json.dumps(measure(self._parent))
                (self._folder / "answer").write_text(text)
                (self._folder / "answer").rename(self._folder / f"answer.{number}")
                number += 1

    def stop(self) -> None:
        self._stop.set()


def measure(parent: int) -> tuple[int, dict[int, int]]:
    """Nanoseconds of the whole guest, and by address space."""
    kernel, spaces = 0, {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            own, session = int(fields[1]) == parent, int(fields[3])
            if own and session == int(entry.name):
                leader = session
                kernel += run_ns(entry) + (int(fields[13]) + int(fields[14])) * 1_000_000_000 // TICKS
            else:
                spaces[int(entry.name)] = (session, run_ns(entry))
        except (FileNotFoundError, ProcessLookupError):
            continue
    of_guest = {pid: ns for pid, (session, ns) in sorted(spaces.items()) if session == leader}
    return kernel + sum(of_guest.values()), of_guest


def run_ns(entry: Path) -> int:
    return sum(int((task / "schedstat").read_text().split()[0]) for task in (entry / "task").iterdir())


class Meter:
    """The guest's side."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._number = 0

    def read(self) -> Reading:
        answer = self._folder / f"answer.{self._number}"
        (self._folder / f"ask.{self._number}").touch()
        at_ns = time.monotonic_ns()
        while not answer.exists():
            time.sleep(POLL_SECONDS)
        self._number += 1
        all_ns, spaces = json.loads(answer.read_text())
        return Reading(at_ns, all_ns, {int(pid): ns for pid, ns in spaces.items()})
