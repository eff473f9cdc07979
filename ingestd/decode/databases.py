"""Read signal databases (DBC, KCD, SYM, ARXML) into plain definitions.

cantools parses; what leaves this module are frozen dataclasses without cantools objects, so that a database can be
parsed in another process and handed over.

Invariants: bit positions are counted as DESIGN's decoder reads them: for little-endian signals from the least
significant bit of byte 0 upwards, for big-endian ones from the most significant bit of byte 0 downwards ("network
order"), so that in both cases a signal occupies `start` … `start + length - 1`. Only integers of 1 to 64 bits and IEEE
floats of 16, 32 and 64 bits are kept; messages that cannot be decoded (containers) are left out with a warning.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ingestd.errors import SignalDatabaseError, UsageError

Match = Literal["auto", "id", "pgn"]
FORMATS = {".dbc": "dbc", ".kcd": "kcd", ".sym": "sym", ".arxml": "arxml"}


@dataclass(frozen=True, slots=True)
class SignalDefinition:
    """Where a signal's bits are and what they mean. `scale` and `offset` are ints where they are whole numbers."""

    name: str
    start: int
    length: int
    big_endian: bool
    signed: bool
    floating: bool
    scale: int | float
    offset: int | float
    minimum: float | None
    maximum: float | None
    unit: str | None
    labels: dict[int, str] | None  # raw value to label
    is_multiplexor: bool
    multiplexor: str | None  # the signal that selects this one …
    multiplexor_values: frozenset[int] | None  # … and the raw values that do

    @property
    def end(self) -> int:
        """The first bit behind the signal, in its own bit order."""
        return self.start + self.length

    @property
    def layout(self) -> str:
        """Everything that decides the value, in one canonical line (part of the signal group's id)."""
        kind = "f" if self.floating else "-" if self.signed else "+"
        order = 0 if self.big_endian else 1
        return f"{self.start}|{self.length}@{order}{kind}({_canonical(self.scale)},{_canonical(self.offset)})"


@dataclass(frozen=True, slots=True)
class MessageDefinition:
    """A message of a database. `by_pgn`: any sender, priority and (PDU1) destination of its PGN is this message."""

    name: str
    arbitration_id: int
    extended: bool
    by_pgn: bool
    length: int
    signals: tuple[SignalDefinition, ...]  # in order of their start bit
    origin: str  # the database's file name


@dataclass(frozen=True, slots=True)
class SignalDatabase:
    """The messages of one file, its identity, and what had to be said while reading it."""

    name: str
    sha256: str
    match: Match
    messages: tuple[MessageDefinition, ...]
    warnings: tuple[str, ...]


def _canonical(number: float) -> str:
    """The same text for 2, 2.0 and 2.00: what another tool wrote otherwise is the same definition."""
    return repr(int(number)) if float(number).is_integer() else repr(float(number))


def pgn_of(arbitration_id: int) -> int:
    """The parameter group number in a 29-bit id: without priority and source; PDU1 also without destination.

    Source: SAE J1939-21, 5.2: PDU format below 240 means that the next byte is a destination, not part of the PGN.
    """
    pgn = (arbitration_id >> 8) & 0x3FFFF
    return pgn if (pgn >> 8) & 0xFF >= 240 else pgn & 0x3FF00


def load(path: Path, match: Match = "auto") -> SignalDatabase:
    """Parse the database at `path`.

    Raises SignalDatabaseError with file, line and reason when the file cannot be read or parsed.
    """
    kind = FORMATS.get(path.suffix.lower())
    if kind is None and not path.is_dir():
        raise UsageError(f"{path}: unknown kind of signal database", "supported are " + ", ".join(FORMATS))
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise SignalDatabaseError(f"{path}: not a regular file", "give the path of a signal database")
        content = path.read_bytes()
    except OSError as error:
        raise SignalDatabaseError(f"{path}: {error.strerror}", "give the path of a signal database") from error
    assert kind is not None, "a folder cannot be read"
    warnings: list[str] = []
    text = _text(content)
    if "\0" in text:
        warnings.append(f"{path.name}: has NUL characters, which no database can store: left out")
        text = text.replace("\0", "")
    with _overheard(warnings, path):
        database = _parse(path, text, kind, warnings)
    messages = []
    for message in database.messages:
        if message.is_container:
            warnings.append(f"{path.name}: message {message.name} is a container, which is not supported: not decoded")
        else:
            messages.append(_message(message, match, path, warnings))
    return SignalDatabase(path.name, hashlib.sha256(content).hexdigest(), match, tuple(messages), tuple(warnings))


def _text(content: bytes) -> str:
    """UTF-8 where it is valid, else Windows-1252, in which most tools write; its five unassigned bytes become '?'."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("cp1252", errors="replace")


def _parse(path: Path, text: str, kind: str, warnings: list[str]) -> Any:
    import cantools  # Not above: it takes 0.4 s, and commands that read no database need not wait for it.

    try:
        return cantools.database.load_string(text, database_format=kind, strict=True)
    except Exception as error:  # cantools raises whatever its parsers meet: ParseError, KeyError, ValueError …
        reason = _reason(error)
    try:
        database = cantools.database.load_string(text, database_format=kind, strict=False)
    except Exception as error:
        reason = _reason(error)
        line = _line_of(reason, text)
        raise SignalDatabaseError(
            f"{path}{f', line {line}' if line else ''}: {reason}", "correct the file or use another database"
        ) from error
    warnings.append(f"{path.name}: loads only without strict checks: {reason}")
    return database


def _reason(error: Exception) -> str:
    """What went wrong, in one line, without cantools' list of the formats it tried."""
    causes = [cause for name in FORMATS.values() if (cause := getattr(error, f"e_{name}", None)) is not None]
    message = " ".join(str(causes[0] if causes else error).split())
    return message or type(error).__name__


def _line_of(reason: str, text: str) -> int | None:
    """The line that a reason speaks of: named by the parser, or found by the message or entry it names."""
    if named := re.search(r"\bline (\d+)", reason):
        return int(named[1])
    needles = [rf"^\s*BO_\s+\d+\s+{re.escape(m)}\s*:" for m in re.findall(r"in message (\w+)", reason)]
    needles += [
        rf"^\s*{kind}_\s+{number}\s+{name}\b" for kind, number, name in re.findall(r"\b(\w+)_ (\d+) (\w+)", reason)
    ]
    for needle in needles:
        if found := re.search(needle, text, re.MULTILINE):
            return text.count("\n", 0, found.end()) + 1
    return None


@contextmanager
def _overheard(warnings: list[str], path: Path) -> Iterator[None]:
    """Turn what cantools logs while it loads (overwritten messages and the like) into warnings that name the file."""

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            warnings.append(f"{path.name}: {record.getMessage()}")

    logger, listener = logging.getLogger("cantools"), Listener(logging.WARNING)
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(listener)
    try:
        yield
    finally:
        logger.removeHandler(listener)
        logger.propagate = propagate


def _message(message: Any, match: Match, path: Path, warnings: list[str]) -> MessageDefinition:
    says_j1939 = message.protocol == "j1939"
    signals: list[SignalDefinition] = []
    for signal in message.signals:
        definition = _signal(signal)
        refused = _unsupported(definition)
        if refused:
            warnings.append(f"{path.name}: {message.name}.{signal.name} {refused}: not decoded")
            continue
        for other in [each for each in signals if each.name == definition.name and _meet(each, definition)]:
            warnings.append(f"{path.name}: {message.name}.{signal.name} is defined twice: the last one is used")
            signals.remove(other)
        signals.append(definition)
    return MessageDefinition(
        name=message.name,
        arbitration_id=message.frame_id,
        extended=message.is_extended_frame,
        by_pgn=message.is_extended_frame and (match == "pgn" or (match == "auto" and says_j1939)),
        length=message.length,
        signals=tuple(signals),
        origin=path.name,
    )


def _meet(one: SignalDefinition, other: SignalDefinition) -> bool:
    """Whether two signals are on the same page. One name on several pages is allowed."""
    if one.multiplexor != other.multiplexor:
        return False
    if one.multiplexor_values is None or other.multiplexor_values is None:
        return True
    return bool(one.multiplexor_values & other.multiplexor_values)


def _unsupported(signal: SignalDefinition) -> str:
    """Why a signal cannot be decoded; empty if it can."""
    if signal.length not in ((16, 32, 64) if signal.floating else range(1, 65)):
        return f"is {'a float' if signal.floating else 'an integer'} of {signal.length} bits"
    try:
        largest = float(2**signal.length * abs(signal.scale) + abs(signal.offset))
    except OverflowError:
        largest = math.inf
    if signal.floating:
        largest = float(signal.scale) + float(signal.offset)
    return "" if math.isfinite(largest) else "has values beyond what a float64 holds"


def _signal(signal: Any) -> SignalDefinition:
    big_endian = signal.byte_order == "big_endian"
    conversion = signal.conversion
    labels = {int(raw): str(label) for raw, label in conversion.choices.items()} if conversion.choices else None
    scale, offset = conversion.scale, conversion.offset
    if math.isfinite(scale) and math.isfinite(offset) and float(scale).is_integer() and float(offset).is_integer():
        scale, offset = int(scale), int(offset)  # cantools computes such signals in whole numbers
    return SignalDefinition(
        name=signal.name,
        start=8 * (signal.start // 8) + 7 - signal.start % 8 if big_endian else signal.start,
        length=signal.length,
        big_endian=big_endian,
        signed=bool(signal.is_signed),
        floating=bool(conversion.is_float),
        scale=scale,
        offset=offset,
        minimum=None if signal.minimum is None else float(signal.minimum),
        maximum=None if signal.maximum is None else float(signal.maximum),
        unit=signal.unit or None,
        labels=labels,
        is_multiplexor=bool(signal.is_multiplexer),
        multiplexor=signal.multiplexer_signal,
        multiplexor_values=None if signal.multiplexer_ids is None else frozenset(signal.multiplexer_ids),
    )
