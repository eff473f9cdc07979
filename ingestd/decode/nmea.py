"""NMEA 0183 sentences to signals, as pynmeagps reads them.

Every kind of sentence is a signal group: of source `gps/GN` where `gps` is the configured name and GN the talker (P for
proprietary sentences, which name no talker), with channels `RMC.lat`, `GGA.alt`, `UBX00.SOG`: sentence and pynmeagps'
name of the field. The same sentence with more or fewer fields, as devices of another NMEA version send it, or with
another number of satellites, is another group, and more than `GROUP_CHANNELS_MAX` fields are several groups.

- Whether a channel is number or text depends on its definition, never on what it holds: numbers and signed decimal
  degrees are numbers, a time of day is its seconds, a date is ISO text; flags, names and hexadecimal fields are text.
- An empty field, or one that pynmeagps makes nothing of, is none with the quality NOT_AVAILABLE.
- Fields behind the last that pynmeagps knows of are text, `field_15` for the fifteenth.
- `RMC.utc` and `ZDA.utc` are a clock reference: seconds since 1970. RMC has one only while its status is A; ZDA has no
  status, and before the first fix it may hold what the receiver's own clock says. Two-digit years are 1969 to 2068.

Source: pynmeagps' tables for the fields; units from the standard as gpsd's "NMEA Revealed" has it, and from the u-blox
8 / M8 protocol description for PUBX,00.

Invariants: every frame is counted in exactly one of decoded, unknown (not a sentence, or none that pynmeagps knows),
undecoded (it raises). No frame raises out of `decode`, and none takes longer than its length allows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from functools import lru_cache, reduce
from operator import xor
from typing import Any, Final

import numpy as np
import pynmeagps

from ingestd.decode.can import Counts, Decoded
from ingestd.model import GROUP_CHANNELS_MAX, Channel, FrameBatch, Memory, Quality, SerialFlag, SignalBatch, SignalGroup

ORIGIN: Final = "NMEA 0183"

TEXT_TYPES: Final = frozenset({"CH", "ST", "HX", "QS", "LAD", "LND", "DT", "DTL", "DM"})  # pynmeagps' types of fields
DEGREE_TYPES: Final = frozenset({"LA", "LN"})
TIME_TYPE: Final = "TM"
EXTRA_TYPE: Final = "ST"
CLOCKS: Final = frozenset({"RMC", "ZDA"})

# What a definition may ask for beyond the fields that came: the longest that pynmeagps has. A sentence that asks for
# more lies about its number of repeats, and pynmeagps would go on for as many as it says.
MISSING_FIELDS_MAX: Final = 256

# None of them is a bug of ours: pynmeagps lets through what its tables and int() raise.
_PARSE_ERRORS: Final = (
    pynmeagps.NMEAMessageError,
    pynmeagps.NMEAParseError,
    pynmeagps.NMEATypeError,
    ArithmeticError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
)


def _units(*lines: str) -> dict[str, str]:
    """From "unit: SENTENCE.field SENTENCE.field …" to the unit of each."""
    return {name: unit for line in lines for unit, _, names in [line.partition(": ")] for name in names.split()}


# Only where the standard fixes the unit; where a field of its own names it, the sentence carries it as text.
UNITS: Final = _units(
    "kn: RMC.spd VTG.sogn VHW.spdN VPW.spdN MWD.speedN VDR.spd RMA.sog RMB.velclos VBW.longwaterspd VBW.transwaterspd "
    "VBW.longgroundspd VBW.transgroundspd",
    "km/h: VTG.sogk VHW.spdK VPW.spdK UBX00.SOG",
    "m/s: MWD.speedM UBX00.vVel",
    "deg: RMC.cog RMC.mv VTG.cogt VTG.cogm HDG.headingM HDG.deviation HDG.variation HDM.headingM HDT.headingT "
    "THS.headt VHW.hdgT VHW.hdgM MWD.dirT MWD.dirM MWV.angle VDR.dirT VDR.dirM GST.orient RMB.bearing BOD.bearT "
    "BOD.bearM BWC.bearT BWC.bearM BWR.bearT BWR.bearM UBX00.COG RSA.stbdangle RSA.portangle RMA.cog RMA.var "
    "GSV.elv GSV.az",
    "deg/min: ROT.rot",
    "dBHz: GSV.cno",
    "m: GGA.alt GGA.sep GNS.alt GNS.sep DBT.depthm DPT.depth DPT.offset DPT.rangescale GST.rangeRms GST.stdMajor "
    "GST.stdMinor GST.stdLat GST.stdLong GST.stdAlt GBS.errLat GBS.errLon GBS.errAlt GRS.residual UBX00.altRef "
    "UBX00.hAcc UBX00.vAcc DTM.alt",
    "ft: DBT.depthf",
    "fathom: DBT.depthfath",
    "nmi: VLW.twd VLW.wd VLW.tgd VLW.gd RMB.range RMB.ctrkerr BWC.dist BWR.dist",
    "degC: MTW.temp",
    "s: GGA.diffAge GNS.diffAge UBX00.diffAge",
    "%: GBS.prob",
)  # fmt: skip


class _Fields(list[str]):
    """The fields of a sentence, which ask no end of times for what is not there at most once too often."""

    missing = 0

    def __getitem__(self, key: Any) -> Any:
        try:
            return super().__getitem__(key)
        except IndexError:
            self.missing += 1
            if self.missing > MISSING_FIELDS_MAX:
                raise ValueError("more repeats announced than there are") from None
            raise


# The sentences of an instant repeat its time and place, and those of a device its flags.
_str2val = lru_cache(maxsize=1024)(pynmeagps.NMEAMessage.str2val)


class _Sentence(pynmeagps.NMEAMessage):  # type: ignore[misc]
    """pynmeagps' message, which also remembers the type of each field, in the order of its attributes."""

    __setattr__ = object.__setattr__  # pynmeagps' own asks each time whether the message is finished.

    def __init__(self, talker: str, name: str, fields: Sequence[str], checksum: str) -> None:
        object.__setattr__(self, "_types", [])
        super().__init__(talker, name, pynmeagps.GET, payload=fields, checksum=checksum, validate=pynmeagps.VALNONE)

    def str2val(self, vals: str, att: str) -> Any:
        value = _str2val(vals, att)
        self._types.append(att)
        return value

    @property
    def types(self) -> tuple[str, ...]:
        """pynmeagps' type of each known field; empty for a sentence that it does not know."""
        return tuple(self._types)

    @property
    def values(self) -> dict[str, Any]:
        """The known fields by pynmeagps' names, in wire order."""
        return {name: value for name, value in vars(self).items() if name[0] != "_"}


@dataclass(frozen=True, slots=True)
class _Layout:
    """Sentences of one talker with the same fields: their groups, and which channels, over all groups, are text."""

    groups: tuple[SignalGroup, ...]
    is_text: tuple[bool, ...]

    def batches(self, ts_ns: list[int], rows: list[list[float | str | None]]) -> list[SignalBatch]:
        """A batch for each group; `rows` has the value of every channel for each stamp."""
        stamps = np.array(ts_ns, np.int64)
        shape = (len(self.is_text), len(rows))
        value, text = np.full(shape, np.nan), np.full(shape, None, np.object_)
        quality = np.zeros(shape, np.int16)
        for number, (column, is_text) in enumerate(zip(zip(*rows, strict=True), self.is_text, strict=True)):
            if is_text:
                text[number] = column
            else:
                value[number] = [math.nan if each is None else each for each in column]
            quality[number] = [Quality.NOT_AVAILABLE if each is None else 0 for each in column]
        batches, start = [], 0
        for group in self.groups:
            part = slice(start, start + len(group.channels))
            start = part.stop
            batches.append(
                SignalBatch(
                    group,
                    stamps,
                    value[part],
                    text[part] if any(self.is_text[part]) else None,
                    quality[part] if quality[part].any() else None,
                )
            )
        return batches


class NmeaDecoder:
    """Decodes the frames of one source of the protocol `nmea`. Layouts are made when their first sentence comes."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._layouts: dict[tuple[object, ...], _Layout] = {}

    def __repr__(self) -> str:
        return f"<NmeaDecoder {self.source}: {len(self._layouts)} layouts>"

    def decode(self, frames: FrameBatch, _: Memory | None = None) -> Decoded:
        """Decode a batch. A group's sentences are together, in wire order."""
        counts = Counts(frames=len(frames))
        gathered: dict[int, tuple[_Layout, list[int], list[list[float | str | None]]]] = {}
        columns = zip(frames.ts_ns.tolist(), frames.flags.tolist(), frames.length.tolist(), frames.data, strict=True)
        for ts_ns, flags, length, data in columns:
            if not flags & SerialFlag.SERIAL:
                counts.unknown += 1
                continue
            try:
                sentence = _parse(data[:length].tobytes())
                row = None if sentence is None else _row(sentence)
            except _PARSE_ERRORS:
                counts.undecoded += 1
                continue
            if sentence is None or row is None:
                counts.unknown += 1
                continue
            layout = self._layout(sentence)
            stamps, rows = gathered.setdefault(id(layout), (layout, [], []))[1:]
            stamps.append(ts_ns)
            rows.append(row)
            counts.decoded += 1
        batches = [batch for layout, stamps, rows in gathered.values() for batch in layout.batches(stamps, rows)]
        counts.signals = sum(batch.value.size for batch in batches)
        return Decoded(batches, counts)

    def _layout(self, sentence: _Sentence) -> _Layout:
        names = tuple(sentence.values)
        key = (sentence.talker, sentence.identity, names, sentence.types, len(sentence.payload))
        if key not in self._layouts:
            self._layouts[key] = self._make_layout(sentence, names)
        return self._layouts[key]

    def _make_layout(self, sentence: _Sentence, names: tuple[str, ...]) -> _Layout:
        name = _name(sentence)
        extra = tuple(f"field_{number:02d}" for number in range(len(names) + 1, len(sentence.payload) + 1))
        kinds = [*zip(names, sentence.types, strict=True), *((each, EXTRA_TYPE) for each in extra)]
        channels = [Channel(f"{name}.{each}", _unit(name, each, kind), layout=kind) for each, kind in kinds]
        is_text = [kind in TEXT_TYPES for _, kind in kinds]
        if name in CLOCKS:
            channels.append(Channel(f"{name}.utc", "s", layout="utc"))
            is_text.append(False)
        groups = tuple(
            SignalGroup.make(
                f"{self.source}/{sentence.talker}", name, "", ORIGIN, tuple(channels[at : at + GROUP_CHANNELS_MAX])
            )
            for at in range(0, len(channels), GROUP_CHANNELS_MAX)
        )
        return _Layout(groups, tuple(is_text))


def _parse(payload: bytes) -> _Sentence | None:
    """The sentence; None if it is none or pynmeagps does not know it. Raises what _PARSE_ERRORS has."""
    text = payload.decode("ascii")
    if text[:1] not in ("$", "!") or "*" not in text:
        return None
    content, talker, name, fields, checksum = pynmeagps.get_parts("$" + text[1:])
    if int(checksum, 16) != reduce(xor, content.encode(), 0):
        raise pynmeagps.NMEAParseError("checksum")
    sentence = _Sentence(talker, name, _Fields(fields), checksum)
    return sentence if sentence.types else None


def _row(sentence: _Sentence) -> list[float | str | None]:
    """The value of every channel; None for none."""
    values = sentence.values
    row = [_CONVERT.get(kind, _text)(value) for kind, value in zip(sentence.types, values.values(), strict=True)]
    row += [each or None for each in sentence.payload[len(values) :]]
    if _name(sentence) in CLOCKS:
        row.append(_utc(values))
    return row


def _name(sentence: _Sentence) -> str:
    """RMC of GNRMC, UBX00 of PUBX,00."""
    return str(sentence.identity)[len(sentence.talker) :]


def _unit(name: str, channel: str, kind: str) -> str | None:
    if kind in DEGREE_TYPES:
        return "deg"
    if kind == TIME_TYPE:
        return "s"
    return UNITS.get(f"{name}.{channel.partition('_')[0]}")


def _number(value: Any) -> float | None:
    number = math.nan if isinstance(value, str) else float(value)
    return None if math.isnan(number) else number


def _seconds(value: Any) -> float | None:
    if not isinstance(value, time):
        return None
    return value.hour * 3600 + value.minute * 60 + value.second + value.microsecond / 1e6


def _text(value: Any) -> str | None:
    return value.isoformat() if isinstance(value, date) else str(value) or None


_CONVERT: Final[dict[str, Callable[[Any], float | str | None]]] = {
    "DE": _number,
    "IN": _number,
    "LA": _number,
    "LN": _number,
    TIME_TYPE: _seconds,
}


def _utc(values: dict[str, Any]) -> float | None:
    """Seconds since 1970 of a sentence with date and time, None where they are missing, impossible or not valid."""
    day, of_day = values.get("date"), values.get("time")
    if values.get("status", "A") != "A" or not isinstance(of_day, time):
        return None
    if "year" in values:
        try:
            day = date(values["year"], values["month"], values["day"])
        except (KeyError, TypeError, ValueError, OverflowError):
            return None
    if not isinstance(day, date):
        return None
    return datetime.combine(day, of_day, UTC).timestamp()
