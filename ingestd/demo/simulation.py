"""The simulated car as hardware: buses and a GPS to record from, for as long as a `with` lasts.

The player is a process of its own (see `player`), so its work is nobody else's processor time and its clock nobody
else's event loop; it ends with its parent, however that ends.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from types import TracebackType
from typing import Any, Final, Literal, Self

from ingestd.demo import BUSES, GPS, databases
from ingestd.demo.counts import Counts, State
from ingestd.errors import IngestdError

ORDER_SECONDS_MAX: Final = 30.0
POLL_SECONDS: Final = 0.01

BusKind = Literal["auto", "slcan", "vcan"]


class Simulation:
    """The ports are there from entering on; nothing is sent before `play`, so that recorders do not miss the start."""

    def __init__(self, buses: BusKind = "auto") -> None:
        self._buses = buses
        self._process: subprocess.Popen[bytes] | None = None
        self._sources = [*BUSES, GPS]
        self.places: dict[str, dict[str, str]] = {}  # where each source is: interface and channel, or port

    def __enter__(self) -> Self:
        """Start the player. Raises IngestdError if it does not come up."""
        with Counts.file(len(self._sources)) as file:
            self._counts = Counts(file.fileno(), self._sources)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ingestd.demo.player", str(file.fileno()), self._buses],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,  # An order that cannot be written must not wait in a buffer for another try.
                pass_fds=(file.fileno(),),
                start_new_session=True,  # Ctrl-C is for the recorder, which stops us when it is done.
            )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.close()
            raise IngestdError("the simulated car did not start", "what its process said is above")
        self.places = json.loads(line)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def configuration(self) -> str:
        """The [[can]] and [[serial]] tables of a recorder of this car, in TOML."""
        tables: list[tuple[str, dict[str, Any]]] = []
        for name, path in databases().items():
            bus: dict[str, Any] = {"name": name, **self.places[name], "dbc": [str(path)]}
            if bus["interface"] == "slcan":
                bus |= {"bitrate": 500_000, "options": {"sleep_after_open": 0.0}}  # No adapter that has to boot.
            tables.append(("can", bus))
        tables.append(("serial", {"name": GPS, **self.places[GPS], "baudrate": 115_200, "protocol": "nmea"}))
        return "\n".join(
            "\n".join([f"[[{kind}]]", *(f"{key} = {_toml(value)}" for key, value in table.items()), ""])
            for kind, table in tables
        )

    def play(self) -> None:
        """Start the engine. Blocks until the first frame is due."""
        self._order("p", State.PLAYING)

    def stop(self) -> dict[str, int]:
        """Send nothing more, and say what was sent in all. What was sent can still be read from the ports."""
        self._order("s", State.STOPPED)
        return self.sent()

    def sent(self) -> dict[str, int]:
        """Frames and sentences sent so far, by source. A recorder may be ahead of it by those of the last instant."""
        return self._counts.sent()

    def close(self) -> None:
        """Take the ports away."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(ORDER_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._process = None

    def _order(self, letter: str, state: State) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        deadline = time.monotonic() + ORDER_SECONDS_MAX
        try:
            self._process.stdin.write(letter.encode("ascii"))
        except BrokenPipeError as error:
            raise IngestdError("the simulated car's process has ended", "start again") from error
        while self._counts.state is not state:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise IngestdError("the simulated car's process does not answer", "start again")
            time.sleep(POLL_SECONDS)


def _toml(value: Any) -> str:
    """A value in TOML; what is escaped in a JSON string is so in a basic string of TOML."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(one)}" for key, one in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)
