"""The protocols of serial lines by name: how bytes become frames, and what makes signals of the frames.

Those that come with ingestd are the functions below; a library is imported when a line asks for it and not before.
Others are installed beside it: an entry point of the group `ingestd.protocols`, whose object is a `SerialProtocol`
(docs/serial.md has an example).

`options` are the keys of the configuration that belong to the protocol, as keyword arguments; a framer and a decoder
are each given those that they name. A plugin's are what the configuration has in `options`, for both of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Final, Protocol, TypeVar, runtime_checkable

from ingestd.decode.can import Decoded
from ingestd.errors import ConfigError
from ingestd.framing import FRAMERS, Framer
from ingestd.model import FrameBatch, Memory

GROUP: Final = "ingestd.protocols"

Options = Mapping[str, Any]
_NUL: Final = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")  # in JSON
Made = TypeVar("Made")


class FrameDecoder(Protocol):
    """What makes signals of one source's frames.

    It may keep what follows from the configuration, and what it has worked out once. What it has to know of earlier
    frames is in `memory`, because the frames of several feeds go through one decoder in turns, and some of them twice.
    """

    def decode(self, frames: FrameBatch, memory: Memory, /) -> Decoded:
        """Decode a batch; every frame is counted once. Brings `memory` up to date."""


@runtime_checkable
class RememberingDecoder(FrameDecoder, Protocol):
    """A decoder whose memory has to outlive a stretch of the journal.

    One that can do without, and then only knows less, says so by `needs_memory = False`.
    """

    def remember(self, frames: FrameBatch, memory: Memory, /) -> None:
        """Bring `memory` up to date as `decode` would; it may pass over frames that teach nothing of weight."""


def check_memory(memory: Memory) -> None:
    """Raise ValueError if a memory is nothing that can be committed with the feed's position: JSON, without NUL."""
    if not memory:
        return
    try:
        said = json.dumps(memory, allow_nan=False, ensure_ascii=False)
        said.encode()
        is_same = json.loads(said) == memory
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"what the decoder remembers is no JSON: {error}") from error
    if not is_same:
        raise ValueError("what the decoder remembers is no JSON: it has tuples, or keys that are no strings")
    if _NUL.search(said):
        raise ValueError("what the decoder remembers has a NUL in it, which PostgreSQL does not take")


@dataclass(frozen=True, slots=True)
class SerialProtocol:
    """What a plugin gives.

    framer   called with the options: a new `Framer`
    decoder  called with the name of the source and the options: its `FrameDecoder`. None: the frames are those of a
             CAN bus (`SerialFrame` has an arbitration id), decoded with the signal databases of the line
    """

    framer: Callable[..., Framer]
    decoder: Callable[..., FrameDecoder] | None = None


@dataclass(frozen=True, slots=True)
class Line:
    """What the configuration says of a serial line's protocol."""

    protocol: str
    options: Options


def new_framer(line: Line) -> Framer:
    """A framer for one line. Raises ConfigError for a plugin that cannot be loaded."""
    if line.protocol in FRAMERS:
        return FRAMERS[line.protocol]()
    return _made(line, plugin(line.protocol).framer)


def new_decoder(source: str, line: Line) -> FrameDecoder | None:
    """The decoder of a line; None if its frames are those of a CAN bus. Raises ConfigError as `new_framer` does."""
    if line.protocol in _DECODERS:
        return _DECODERS[line.protocol](source, line.options)
    make = plugin(line.protocol).decoder
    return None if make is None else _made(line, make, source)


def _made(line: Line, make: Callable[..., Made], *given: str) -> Made:
    """What a plugin makes of the configuration's options."""
    try:
        return make(*given, **line.options)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        raise ConfigError(f'the protocol "{line.protocol}" cannot do with its options: {said}') from error


def plugin(name: str) -> SerialProtocol:
    """The protocol that an installed package brings. Raises ConfigError if it cannot be loaded."""
    found = list(entry_points(group=GROUP, name=name))
    if not found:
        raise ConfigError(f'no installed package brings the protocol "{name}"', f"install one with a {GROUP} of it")
    try:
        loaded = found[0].load()
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        raise ConfigError(f'the protocol "{name}" ({found[0].value}) cannot be loaded: {said}') from error
    if not isinstance(loaded, SerialProtocol):
        raise ConfigError(f'the protocol "{name}" ({found[0].value}) is no ingestd.protocols.SerialProtocol')
    return loaded


def _nmea(source: str, _: Options) -> FrameDecoder:
    from ingestd.decode.nmea import NmeaDecoder

    return NmeaDecoder(source)


def _lines(source: str, _: Options) -> FrameDecoder:
    from ingestd.decode.raw import RawDecoder

    return RawDecoder(source)


def _ubx(source: str, _: Options) -> FrameDecoder:
    from ingestd.decode.ubx import UbxDecoder

    return UbxDecoder(source)


def _keyvalue(source: str, options: Options) -> FrameDecoder:
    from ingestd.decode.keyed import KeyValueDecoder

    return KeyValueDecoder(source, time_field=options.get("time_field"))


def _json(source: str, options: Options) -> FrameDecoder:
    from ingestd.decode.keyed import JsonDecoder

    return JsonDecoder(source, time_field=options.get("time_field"))


def _csv(source: str, options: Options) -> FrameDecoder:
    from ingestd.decode.csv_rows import CsvDecoder

    return CsvDecoder(source, **options)


def _cobs(source: str, options: Options) -> FrameDecoder:
    from ingestd.decode.cobs import CobsDecoder

    return CobsDecoder(source, **options)


_DECODERS: Final[dict[str, Callable[[str, Options], FrameDecoder]]] = {
    "nmea": _nmea,
    "ubx": _ubx,
    "lines": _lines,
    "keyvalue": _keyvalue,
    "json": _json,
    "csv": _csv,
    "cobs": _cobs,
}
