"""u-blox binary messages to signals, as pyubx2 reads them; NMEA sentences between them go to the decoder of NMEA.

Every kind of message is a signal group of the source, with channels `NAV-PVT.lat`: message and pyubx2's name of the
field, numbered in what is repeated (`NAV-SAT.cno_03`). The same message with another number of repeats is another
group, and more than `GROUP_CHANNELS_MAX` fields are several groups; of those all but the last are shared.

- Fields are scaled as pyubx2 has them, so a latitude is in degrees; `UNITS` has what the receiver description says.
  Bits of a bit field are channels of their own, reserved ones are none. Characters are text.
- A message that is shorter than its definition, as older firmware sends some, gives the fields that are wholly there,
  with the quality SHORT_FRAME.
- `NAV-PVT.utc` and `NAV-TIMEUTC.utc` are a clock reference: seconds since 1970 where the message calls its date and
  time valid, otherwise none. No stamp is changed by them.

Source: pyubx2's tables for the fields; units from the u-blox 8 / M8 Receiver Description, UBX-13003221.

Invariants: every frame is counted in exactly one of decoded, unknown (a message that pyubx2 does not know, or no
message), undecoded (it raises). No frame raises out of `decode`, and none takes longer than its length allows.
"""

from __future__ import annotations

import struct
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import numpy as np
import pyubx2

from ingestd.decode.can import Counts, Decoded
from ingestd.decode.nmea import NmeaDecoder
from ingestd.decode.scalars import Scalar, column_of
from ingestd.model import GROUP_CHANNELS_MAX, Channel, FrameBatch, Memory, Quality, SignalBatch, SignalGroup

ORIGIN: Final = "UBX"
SYNC: Final = b"\xb5\x62"
FRAME_BYTES_MIN: Final = 8

# None of them is a bug of ours: pyubx2 lets through what its tables and int() raise.
_PARSE_ERRORS: Final = (
    pyubx2.UBXMessageError,
    pyubx2.UBXParseError,
    pyubx2.UBXTypeError,
    struct.error,
    ArithmeticError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
)

_POSITION: Final = {"lon": "deg", "lat": "deg", "height": "mm", "hMSL": "mm", "hAcc": "mm", "vAcc": "mm", "iTOW": "ms"}
_VELOCITY: Final = dict.fromkeys(("velN", "velE", "velD", "gSpeed", "sAcc"), "mm/s")  # fmt: skip
UNITS: Final[dict[str, dict[str, str]]] = {
    "NAV-PVT": {
        **_POSITION, **_VELOCITY, "tAcc": "ns", "nano": "ns", "headMot": "deg", "headAcc": "deg", "headVeh": "deg",
        "magDec": "deg", "magAcc": "deg",
    },
    "NAV-POSLLH": _POSITION,
    "NAV-HPPOSLLH": _POSITION,
    "NAV-VELNED": {
        "iTOW": "ms", "velN": "cm/s", "velE": "cm/s", "velD": "cm/s", "speed": "cm/s", "gSpeed": "cm/s",
        "sAcc": "cm/s", "heading": "deg", "cAcc": "deg",
    },
    "NAV-ATT": {
        "iTOW": "ms", "roll": "deg", "pitch": "deg", "heading": "deg", "accRoll": "deg", "accPitch": "deg",
        "accHeading": "deg",
    },
    "NAV-TIMEUTC": {"iTOW": "ms", "tAcc": "ns", "nano": "ns"},
    "NAV-SAT": {"iTOW": "ms", "cno": "dBHz", "elev": "deg", "azim": "deg", "prRes": "m"},
    "ESF-INS": {
        "iTOW": "ms", "xAngRate": "deg/s", "yAngRate": "deg/s", "zAngRate": "deg/s", "xAccel": "m/s²",
        "yAccel": "m/s²", "zAccel": "m/s²",
    },
}  # fmt: skip
CLOCKS: Final = {"NAV-PVT": ("validDate", "validTime"), "NAV-TIMEUTC": ("validUTC",)}


class _BeyondEndError(Exception):
    """The definition has fields that the message does not."""


class _Message(pyubx2.UBXMessage):  # type: ignore[misc]
    """pyubx2's message, which stops where its bytes end instead of taking zeros for what is not there."""

    def __init__(self, frame: bytes) -> None:
        object.__setattr__(self, "_is_short", False)
        object.__setattr__(self, "_kind", "")
        super().__init__(frame[2:3], frame[3:4], pyubx2.GET, payload=frame[6:-2])

    def __setattr__(self, name: str, value: Any) -> None:
        if name[0] != "_" and isinstance(value, bytes):
            if self._kind == "X":
                value = int.from_bytes(value, "little")
            else:
                value = value.partition(b"\0")[0].decode("utf-8", "replace")
        object.__setattr__(self, name, value)

    def _do_attributes(self, **kwargs: Any) -> None:
        try:
            super()._do_attributes(**kwargs)
        except _BeyondEndError:
            object.__setattr__(self, "_is_short", True)

    def _do_len_checksum(self) -> None:
        """The framer has compared it, and computing it takes as long as all the rest."""

    def _set_attribute_single(self, anam: str, adef: Any, offset: bool = True, **kwargs: Any) -> None:
        kind = adef[0] if isinstance(adef, tuple) else adef
        if kind not in (pyubx2.CH, "PMPLEN"):
            self._require(kind)
        object.__setattr__(self, "_kind", kind[0])
        super()._set_attribute_single(anam, adef, offset, **kwargs)

    def _set_attribute_bitfield(self, atyp: Any, **kwargs: Any) -> None:
        self._require(atyp[0])
        super()._set_attribute_bitfield(atyp, **kwargs)

    def _require(self, kind: str) -> None:
        if self._offset + pyubx2.attsiz(kind) > len(self._payload):
            raise _BeyondEndError

    @property
    def is_short(self) -> bool:
        """Whether the definition goes on behind its end."""
        return bool(self._is_short)

    @property
    def fields(self) -> dict[str, Any]:
        """The known fields by pyubx2's names, in wire order."""
        return {name: one for name, one in vars(self).items() if name[0] != "_" and not name.startswith("reserved")}


class _Gathered:
    """Messages of one layout."""

    def __init__(self, groups: tuple[SignalGroup, ...]) -> None:
        self.groups = groups
        self.ts_ns: list[int] = []
        self.rows: list[list[Scalar]] = []
        self.short: list[bool] = []

    def batches(self) -> list[SignalBatch]:
        """A batch for each group."""
        stamps = np.array(self.ts_ns, np.int64)
        short = np.array(self.short, np.int16) * np.int16(Quality.SHORT_FRAME)
        columns = [column_of(cells) for cells in zip(*self.rows, strict=True)]
        batches, start = [], 0
        for group in self.groups:
            part = columns[start : start + len(group.channels)]
            start += len(part)
            nothing = np.full(len(stamps), None, np.object_)
            has_text = any(text is not None for _, text, _ in part)
            quality = np.stack([short if each is None else each | short for _, _, each in part])
            batches.append(
                SignalBatch(
                    group,
                    stamps,
                    np.stack([value for value, _, _ in part]),
                    np.stack([nothing if text is None else text for _, text, _ in part]) if has_text else None,
                    quality if quality.any() else None,
                )
            )
        return batches


class UbxDecoder:
    """Decodes the frames of one source of the protocol `ubx`. Layouts are made when their first message comes."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._nmea = NmeaDecoder(source)
        self._groups: dict[tuple[str, ...], tuple[SignalGroup, ...]] = {}

    def __repr__(self) -> str:
        return f"<UbxDecoder {self.source}: {len(self._groups)} layouts>"

    def decode(self, frames: FrameBatch, _: Memory | None = None) -> Decoded:
        """Decode a batch. A group's messages are together, in wire order."""
        is_ubx = (frames.data[:, 0] == SYNC[0]) & (frames.data[:, 1] == SYNC[1]) & (frames.length >= FRAME_BYTES_MIN)
        if not is_ubx.any():
            return self._nmea.decode(frames)
        decoded = self._messages(frames[is_ubx])
        if not is_ubx.all():
            sentences = self._nmea.decode(frames[~is_ubx])
            decoded.batches.extend(sentences.batches)
            decoded.counts.add(sentences.counts)
        return decoded

    def _messages(self, frames: FrameBatch) -> Decoded:
        counts = Counts(frames=len(frames))
        gathered: dict[tuple[str, ...], _Gathered] = {}
        for ts_ns, length, data in zip(frames.ts_ns.tolist(), frames.length.tolist(), frames.data, strict=True):
            try:
                message = _Message(data[:length].tobytes())
            except _PARSE_ERRORS as error:
                is_unknown = isinstance(error, pyubx2.UBXMessageError) and "Unknown message type" in str(error)
                counts.unknown += is_unknown
                counts.undecoded += not is_unknown
                continue
            fields = message.fields
            if not fields:
                counts.unknown += 1
                continue
            name = str(message.identity)
            key = (name, *fields)
            if key not in gathered:
                gathered[key] = _Gathered(self._groups_of(key))
            of_layout = gathered[key]
            of_layout.ts_ns.append(ts_ns)
            of_layout.short.append(message.is_short)
            of_layout.rows.append([_scalar(one) for one in fields.values()])
            if name in CLOCKS:
                of_layout.rows[-1].append(_utc(name, fields))
            counts.decoded += 1
            counts.short += message.is_short
        batches = [batch for of_layout in gathered.values() for batch in of_layout.batches()]
        counts.signals = sum(batch.value.size for batch in batches)
        return Decoded(batches, counts)

    def _groups_of(self, key: tuple[str, ...]) -> tuple[SignalGroup, ...]:
        if key not in self._groups:
            name, *fields = key
            units = UNITS.get(name, {})
            channels = [Channel(f"{name}.{each}", units.get(each.partition("_")[0])) for each in fields]
            if name in CLOCKS:
                channels.append(Channel(f"{name}.utc", "s", layout="utc"))
            self._groups[key] = tuple(
                SignalGroup.make(self.source, name, "", ORIGIN, tuple(channels[at : at + GROUP_CHANNELS_MAX]))
                for at in range(0, len(channels), GROUP_CHANNELS_MAX)
            )
        return self._groups[key]


def _scalar(value: Any) -> Scalar:
    """A list is what pyubx2 makes of an array of bytes."""
    return bytes(value).hex() if isinstance(value, list) else value


def _utc(name: str, fields: dict[str, Any]) -> float | None:
    """Seconds since 1970; None where the message does not call its date and time valid, or they are impossible."""
    if not all(fields.get(flag) for flag in CLOCKS[name]):
        return None
    try:
        of_day = fields["hour"], fields["min"], 0
        moment = datetime(fields["year"], fields["month"], fields["day"], *of_day, tzinfo=UTC)
        seconds = fields["second"] if "second" in fields else fields["sec"]  # 60 is a leap second
        return (moment + timedelta(seconds=seconds, microseconds=fields["nano"] / 1000)).timestamp()
    except (KeyError, ValueError, OverflowError):
        return None
