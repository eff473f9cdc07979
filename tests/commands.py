"""Commands given to a daemon under test, over its control socket."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.books import number_in
from tests.recorder import Recorder, stored


def run_ingestd(*arguments: str | Path, exit_code: int = 0) -> subprocess.CompletedProcess[str]:
    """A command, and how it has to end."""
    command = [sys.executable, "-m", "ingestd", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == exit_code, (done.stdout, done.stderr)
    return done


def ingestd(recorder: Recorder, *arguments: str, exit_code: int = 0) -> subprocess.CompletedProcess[str]:
    """A command that talks to the daemon."""
    return run_ingestd(*arguments, "-c", recorder.config, exit_code=exit_code)


def sessions(recorder: Recorder, *arguments: str) -> Any:
    """What `ingestd sessions …` says to programs."""
    return json.loads(ingestd(recorder, "sessions", *arguments, "--json").stdout)


def is_listening(recorder: Recorder) -> None:
    recorder.wait_for("listening control=", after=recorder.begun)
    recorder.wait_for("link up", after=recorder.begun)


def assert_every_number_once(dsn: str, source: str = "line") -> list[int]:
    """No number of a source is missing between the first and the last, whatever session it is in."""
    lines = [(bytes.fromhex(line), count) for (name, _, line), count in stored(dsn).items() if name == source]
    assert all(count == 1 for _, count in lines)
    numbers = sorted(number for line, _ in lines if (number := number_in(line)) is not None)
    assert numbers == list(range(numbers[0], numbers[-1] + 1))
    return numbers
