"""A synthetic load of any size: signal databases, a capture as candump text, and what a database must hold afterwards.

    python bench/generate.py FOLDER [--frames 5000000] [--buses 2] [--ids 50] [--rate 2000] [--signals 5]
                                    [--fd 0.1] [--multiplexed 0.1] [--seed 1] [--also blf|mf4|asc…]

Writes FOLDER/load.log, a DBC for each bus (FOLDER/can0.dbc …) and FOLDER/load.json (see truth.py), piece by piece: only
the disk limits the size. The same arguments give the same bytes. More than five million frames/s, if the disk takes
300 MB/s.

How it is made: messages have periods, and all of them together a cycle of a second or more, in which the order of the
frames and the place of every field in the text stay the same. A piece is a matrix of text with a row for each cycle;
slot after slot, its stamps and payloads are put in for all cycles at once. Signals are waves with noise, not random
bits, so that they compress as measured ones do. Payloads come from a table made once for each message, of TABLE_ROWS
rows or less, and repeat after that many frames: further apart than any compression looks, but not a drive.

Limits: standard ids until there are too many, then extended ones; no remote or error frames; all stamps in microseconds
and rising; at most 500,000 frames/s in all. `--also` goes through python-can, frame by frame: 50,000 frames/s.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import can
import numpy as np
import truth
from numpy.typing import NDArray

START_US = 1_789_219_800_000_000  # 2026-09-12T13:30:00Z
TABLE_ROWS, TABLE_ROWS_MIN = 8192, 256  # payloads of a message, and fewer where there are many messages
TABLES_ROWS = 1 << 21  # of all tables together
PIECE_BYTES = 16 << 20
PAGES = 4  # of a multiplexed message
FD_FACTOR = 4  # A CAN FD frame has four times the bits of a classic one, and four times the signals.
BITS_MAX = 24
PERIODS_MS = (10, 10, 20, 50, 100, 100, 200, 1000)  # what is usual; scaled so that the rates add up
STANDARD_IDS_MAX = 0x600
STAMP_DIGITS = 17  # 1789219800.000000
THREE_DIGITS = np.frombuffer(b"".join(b"%03d" % n for n in range(1000)), np.uint8).reshape(1000, 3)
HEX = np.frombuffer(b"".join(b"%02X" % n for n in range(256)), np.uint8).reshape(256, 2)


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked for. `rate` is frames/s of each bus, `ids` and `signals` (of a classic frame) are of each, too."""

    frames: int = 5_000_000
    buses: int = 2
    ids: int = 50
    rate: int = 2000
    signals: int = 5
    fd: float = 0.1
    multiplexed: float = 0.1
    seed: int = 1

    def __post_init__(self) -> None:
        if not (self.frames > 0 and self.buses > 0 and self.ids > 0 and self.rate > 0 and 1 <= self.signals <= 32):
            raise ValueError(f"{self}: numbers must be positive, and a frame has at most 32 signals")
        if not (0 <= self.fd <= 1 and 0 <= self.multiplexed <= 1):
            raise ValueError(f"{self}: shares are between 0 and 1")
        if self.buses * self.rate > 500_000:
            raise ValueError(f"{self}: more than 500,000 frames/s have no stamps of their own in microseconds")


@dataclass(frozen=True, slots=True)
class Made:
    """What was made."""

    capture: Path
    databases: dict[str, Path]  # by bus
    channels: list[truth.Channel]
    frames: int
    capture_bytes: int
    seconds: float  # that the load lasts

    @property
    def signals(self) -> int:
        return sum(channel.count for channel in self.channels)

    @property
    def dbc_arguments(self) -> list[str]:
        """As `ingestd import --dbc` takes them."""
        return [f"{bus}:{path}" for bus, path in self.databases.items()]


@dataclass(slots=True)
class Signal:
    """Where it is, how it is scaled, and its raw value in every row of the table; `page` None is every page."""

    name: str
    start: int  # as bits are counted in the message's byte order, from 0
    bits: int
    signed: bool
    factor: float
    offset: float
    page: int | None
    raw: NDArray[np.int64]

    def count_and_sum(self, frames: int) -> tuple[int, int]:
        """After so many frames of the message."""
        rows = len(self.raw)
        here = np.ones(rows, np.bool_) if self.page is None else np.arange(rows) % PAGES == self.page
        turns, rest = divmod(frames, rows)
        raw = np.where(here, self.raw, 0)
        return turns * int(here.sum()) + int(here[:rest].sum()), turns * int(raw.sum()) + int(raw[:rest].sum())


@dataclass(slots=True)
class Message:
    """One id of a bus."""

    bus: int
    name: str
    can_id: int
    extended: bool
    length: int
    fd: bool
    big_endian: bool
    multiplexed: bool
    per_cycle: int
    signals: list[Signal] = field(default_factory=list)

    def prefix(self) -> bytes:
        """What stands in a line before the payload; the stamp is put in later."""
        identifier = b"%08X" % self.can_id if self.extended else b"%03X" % self.can_id
        return b"(%s) can%d %s%s" % (b"0" * STAMP_DIGITS, self.bus, identifier, b"##1" if self.fd else b"#")

    def payloads(self) -> NDArray[np.uint8]:
        """uint8[rows, 2 * length]: the table of payloads as hexadecimal text."""
        rows = len(self.signals[0].raw)
        bits = np.zeros((rows, 8 * self.length), np.uint8)
        for signal in self.signals:
            order = np.arange(signal.bits)[:: -1 if self.big_endian else 1]
            here = slice(None) if signal.page is None else slice(signal.page, None, PAGES)
            raw = signal.raw[here, None]
            bits[here, signal.start : signal.start + signal.bits] = (raw >> order) & 1
        packed = np.packbits(bits, axis=1, bitorder="big" if self.big_endian else "little")
        return HEX[packed].reshape(rows, 2 * self.length)

    def definition(self) -> str:
        """In the words of a DBC."""
        lines = [f"BO_ {self.can_id | self.extended << 31} {self.name}: {self.length} ECU"]
        for signal in self.signals:
            mark = (" M" if signal.page is None else f" m{signal.page}") if self.multiplexed else ""
            # A DBC counts bits from the lowest of byte 0; a big-endian signal is named by its highest bit.
            start = 8 * (signal.start // 8) + 7 - signal.start % 8 if self.big_endian else signal.start
            lowest = -(1 << signal.bits - 1) if signal.signed else 0
            ends = lowest, lowest + (1 << signal.bits) - 1
            low, high = (round(end * signal.factor + signal.offset, 6) for end in ends)
            lines.append(
                f" SG_ {signal.name}{mark} : {start}|{signal.bits}@{0 if self.big_endian else 1}"
                f'{"-" if signal.signed else "+"} ({signal.factor},{signal.offset}) [{low}|{high}] "" Vector__XXX'
            )
        return "\n".join(lines) + "\n"


def messages_of(load: Load, bus: int) -> tuple[list[Message], int]:
    """The messages of a bus, and how many seconds their cycle lasts."""
    dice = np.random.default_rng([load.seed, bus])
    seconds = -(-load.ids // load.rate)  # so that every id occurs in it
    per_cycle = _shares(1 / dice.choice(PERIODS_MS, load.ids), load.rate * seconds)
    rows = max(TABLE_ROWS_MIN, min(TABLE_ROWS, TABLES_ROWS // (load.ids * load.buses))) // PAGES * PAGES
    is_fd = dice.permutation(load.ids) < round(load.fd * load.ids)
    others = np.flatnonzero(~is_fd)
    is_multiplexed = np.isin(np.arange(load.ids), dice.permutation(others)[: round(load.multiplexed * load.ids)])
    made = []
    for number in range(load.ids):
        extended = number >= STANDARD_IDS_MAX
        fd, multiplexed = bool(is_fd[number]), bool(is_multiplexed[number])
        message = Message(
            bus, f"M{bus}_{number:04d}", 0x1800_0000 + number if extended else 0x100 + number, extended,
            8 * FD_FACTOR if fd else 8, fd, not multiplexed and bool(dice.integers(2)), multiplexed,
            int(per_cycle[number]),
        )  # fmt: skip
        message.signals = _signals(message, load.signals * (FD_FACTOR if fd else 1), rows, dice)
        made.append(message)
    return made, seconds


def _shares(weights: NDArray[np.float64], total: int) -> NDArray[np.int64]:
    """Whole numbers from 1 in proportion to the weights, that add up to `total`."""
    shares = 1 + np.floor(weights / weights.sum() * (total - len(weights))).astype(np.int64)
    shares[np.argsort(-weights, kind="stable")[: total - int(shares.sum())]] += 1
    return shares


def _signals(message: Message, count: int, rows: int, dice: np.random.Generator) -> list[Signal]:
    """Side by side in the payload; in a multiplexed message behind the number of the page, on every page others."""
    name = message.name.replace("M", "S", 1)
    if not message.multiplexed:
        return [_signal(f"{name}_{i}", i, 8 * message.length // count, 0, None, rows, dice) for i in range(count)]
    page = Signal(f"{name}_page", 0, 8, False, 1.0, 0.0, None, np.arange(rows, dtype=np.int64) % PAGES)
    each = max(1, count - 1)
    wide = (8 * message.length - 8) // each
    return [page] + [_signal(f"{name}_{p}_{i}", i, wide, 8, p, rows, dice) for p in range(PAGES) for i in range(each)]


def _signal(
    name: str, number: int, wide: int, first: int, page: int | None, rows: int, dice: np.random.Generator
) -> Signal:
    """A wave with noise, in `wide` bits or less."""
    bits = int(dice.integers(max(1, min(wide, BITS_MAX) // 2), min(wide, BITS_MAX) + 1))
    # asammdf takes signed numbers of 8 or 16 bits that do not begin with a byte for others: no peer could be compared.
    signed = bool(dice.integers(2)) and bits not in (1, 8, 16)
    span = 1 << bits
    turns, phase = dice.uniform(0.5, 20), dice.uniform(0, 2 * np.pi)
    wave = np.sin(2 * np.pi * turns * np.arange(rows) / rows + phase) * 0.4 + dice.normal(0, 0.002, rows)
    raw = np.clip(np.rint((wave + 0.5) * (span - 1)), 0, span - 1).astype(np.int64) - (span // 2 if signed else 0)
    factor, offset = float(dice.choice([1.0, 0.5, 0.1, 0.01, 0.25])), float(dice.choice([0.0, 0.0, -40.0]))
    return Signal(name, first + number * wide, bits, signed, factor, offset, page, raw)


class Text:
    """The lines of a load, in pieces."""

    def __init__(self, load: Load, messages: list[Message], seconds: int) -> None:
        self._load, self._messages, self._cycle_us = load, messages, seconds * 1_000_000
        dice = np.random.default_rng([load.seed, load.buses])
        per_cycle = np.array([message.per_cycle for message in messages])
        of, turn = np.repeat(np.arange(len(messages)), per_cycle), np.concatenate([np.arange(n) for n in per_cycle])
        at_us = (turn + dice.random(len(messages))[of]) * (self._cycle_us - len(of)) / per_cycle[of]
        order = np.argsort(at_us, kind="stable")
        numbers = np.arange(len(of))
        self._of, self._turn = of[order], turn[order]
        self._at_us = np.maximum.accumulate(at_us[order].astype(np.int64)) + numbers
        until_us = np.append(self._at_us[1:], self._at_us[0] + self._cycle_us)
        self._room_us = (until_us - self._at_us) / 2  # How late a frame may be and come before the next all the same.
        self._late = np.random.default_rng([load.seed, load.buses, 1])
        self._payloads = [message.payloads() for message in messages]
        lines = [messages[m].prefix() + b"0" * 2 * messages[m].length + b"\n" for m in self._of.tolist()]
        self._ends = np.cumsum([len(line) for line in lines])
        self._template = np.frombuffer(b"".join(lines), np.uint8)
        self._prefix_bytes = [len(message.prefix()) for message in messages]
        self.frames_of = np.zeros(len(messages), np.int64)

    def pieces(self) -> Iterator[NDArray[np.uint8]]:
        """The text; afterwards `frames_of` says how many frames each message has."""
        slots, left, first = len(self._of), self._load.frames, 0
        at_once = max(1, PIECE_BYTES // len(self._template))
        while left > 0:
            cycles = min(at_once, -(-left // slots))
            text = self._cycles(first, cycles).reshape(-1)
            whole, rest = divmod(min(left, cycles * slots), slots)
            self.frames_of += whole * np.bincount(self._of, minlength=len(self._messages))
            self.frames_of += np.bincount(self._of[:rest], minlength=len(self._messages))
            yield text[: whole * len(self._template) + (int(self._ends[rest - 1]) if rest else 0)]
            left, first = left - cycles * slots, first + cycles

    def _cycles(self, first: int, count: int) -> NDArray[np.uint8]:
        """uint8[count, bytes of a cycle]"""
        text = np.empty((count, len(self._template)), np.uint8)
        text[:] = self._template
        stamps = self._stamps(first, count)
        hexadecimal = []
        for message, table in zip(self._messages, self._payloads, strict=True):
            numbers = np.arange(first * message.per_cycle, (first + count) * message.per_cycle) % len(table)
            hexadecimal.append(table.take(numbers, axis=0).reshape(count, message.per_cycle, -1))
        begin = 0
        for slot, (of, turn, end) in enumerate(
            zip(self._of.tolist(), self._turn.tolist(), self._ends.tolist(), strict=True)
        ):
            text[:, begin + 1 : begin + 1 + STAMP_DIGITS] = stamps[:, slot]
            text[:, begin + self._prefix_bytes[of] : end - 1] = hexadecimal[of][:, turn]
            begin = end
        return text

    def _stamps(self, first: int, count: int) -> NDArray[np.uint8]:
        """uint8[count, slots, STAMP_DIGITS]"""
        late = self._late.random((count, len(self._of)), np.float32) * self._room_us
        us = START_US + (first + np.arange(count))[:, None] * self._cycle_us + self._at_us + late.astype(np.int64)
        second, micro = np.divmod(us, 1_000_000)
        earliest = int(second.min())
        seconds = b"".join(b"%010d." % s for s in range(earliest, int(second.max()) + 1))
        digits = np.empty((*us.shape, STAMP_DIGITS), np.uint8)
        digits[..., :11] = np.frombuffer(seconds, np.uint8).reshape(-1, 11).take(second - earliest, axis=0)
        digits[..., 11:14] = THREE_DIGITS.take(micro // 1000, axis=0)
        digits[..., 14:] = THREE_DIGITS.take(micro % 1000, axis=0)
        return digits


def generate(folder: Path, load: Load) -> Made:
    """Write a load into a folder, replacing what is there."""
    folder.mkdir(parents=True, exist_ok=True)
    messages: list[Message] = []
    databases, seconds = {}, 1
    for bus in range(load.buses):
        of_bus, seconds = messages_of(load, bus)
        messages += of_bus
        databases[f"can{bus}"] = folder / f"can{bus}.dbc"
        definitions = "\n".join(message.definition() for message in of_bus)
        databases[f"can{bus}"].write_text(f'VERSION ""\n\nNS_ :\n\nBS_:\n\nBU_: ECU\n\n{definitions}')
    text, capture = Text(load, messages, seconds), folder / "load.log"
    with capture.open("wb") as file, ThreadPoolExecutor(1) as disk:
        writing: Future[int] | None = None
        for piece in text.pieces():
            if writing is not None:
                writing.result()
            writing = disk.submit(file.write, piece.data)
        if writing is not None:
            writing.result()  # A full disk is said, not passed over.
    channels = [
        truth.Channel(
            f"can{message.bus}", f"{message.name}.{signal.name}", signal.factor, signal.offset,
            *signal.count_and_sum(frames),
        )
        for message, frames in zip(messages, text.frames_of.tolist(), strict=True)
        for signal in message.signals
    ]  # fmt: skip
    truth.write(folder / "load.json", channels)
    return Made(capture, databases, channels, load.frames, capture.stat().st_size, load.frames / load.rate / load.buses)


def convert(capture: Path, kind: str) -> Path:
    """The same frames in another format that python-can writes, by the ending of its name."""
    path = capture.with_suffix(f".{kind}")
    with can.LogReader(capture) as reader, can.Logger(path) as logger:
        for message in reader:
            # The formats number their channels. In MF4 a 0 would mean any of them.
            message.channel = int(str(message.channel).removeprefix("can")) + (kind == "mf4")
            logger(message)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    for name, kind, what in (
        ("frames", int, "in all"), ("buses", int, ""), ("ids", int, "of each bus"),
        ("rate", int, "frames/s of each bus"),
        ("signals", int, "of a classic frame"), ("fd", float, "share of ids with CAN FD frames"),
        ("multiplexed", float, "share of ids with pages"), ("seed", int, ""),
    ):  # fmt: skip
        default = Load.__dataclass_fields__[name].default
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"{what} (default {default})".strip())
    parser.add_argument("--also", action="append", default=[], metavar="KIND", help="blf, mf4, asc … beside it")
    arguments = parser.parse_args()
    names = Load.__dataclass_fields__
    started = time.perf_counter()
    made = generate(arguments.folder, Load(**{name: getattr(arguments, name) for name in names}))
    took = time.perf_counter() - started
    print(
        f"{made.capture}: {made.frames:,} frames, {made.signals:,} signals of {len(made.channels):,} channels, "
        f"{made.capture_bytes:,} bytes, {made.seconds:,.0f} s of recording; "
        f"made in {took:.1f} s: {made.frames / took / 1e6:.1f} M frames/s"
    )
    print("--dbc " + " --dbc ".join(made.dbc_arguments))
    for kind in arguments.also:
        print(convert(made.capture, kind))


if __name__ == "__main__":
    main()
