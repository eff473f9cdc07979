"""Serial bytes: every framing whole, in pieces and byte by byte; the decoder of NMEA sentences."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from operator import xor
from typing import Any
from uuid import UUID

from hypothesis import strategies as st

from ingestd.chunks import Placement, encode_frames, encode_signals
from ingestd.decode.can import Decoded
from ingestd.decode.cobs import CobsDecoder
from ingestd.decode.csv_rows import CsvDecoder
from ingestd.decode.keyed import JsonDecoder, KeyValueDecoder
from ingestd.decode.nmea import NmeaDecoder
from ingestd.decode.ubx import UbxDecoder
from ingestd.framing import FRAMERS, SerialFrame
from ingestd.framing.ubx import SYNC, checksum
from ingestd.model import PAYLOAD_BYTES_MAX, ClockState, Memory, SerialFlag
from ingestd.protocols import FrameDecoder
from ingestd.sources.serial import columns
from tests.property.fuzz.mutations import Corpus, Seed, mutated
from tests.property.fuzz.target import Strategies, Target

PLACEMENT = Placement(UUID(int=1), 0, ClockState.SET)
_SENTENCE = re.compile(rb"[$!][A-Za-z0-9]{2,}[,*].*\*[0-9A-Fa-f]{2}|[$!][A-Za-z0-9]{2,}\*[0-9A-Fa-f]{2}")


def checked(body: bytes, start: bytes = b"$") -> bytes:
    """A sentence with its checksum."""
    return start + body + b"*%02X" % reduce(xor, body, 0)


BODIES = (
    b"GPRMC,092751.000,A,5321.6802,N,00630.3371,W,0.06,31.66,280511,,,A",
    b"GNGGA,092750.000,5321.6802,N,00630.3372,W,1,8,1.03,61.7,M,55.2,M,,",
    b"GPGSV,3,1,11,10,63,137,17,07,61,098,15,05,59,290,20,08,54,157,30",
    b"GPZDA,201530.00,04,07,2002,00,00",
    b"PUBX,00,081350.00,4717.113210,N,00833.915187,E,546.589,G3,2.1,2.0,0.007,77.52,0.007,,0.92,1.19,0.77,9,0,0",
    b"GPTXT,01,01,02,u-blox AG - www.u-blox.com",
    b"GPVTG,,T,,M,0.26,N,0.482,K,A",
    b"GPGLL",
    b"INMWV,214.8,R,0.1,K,A",
)
GOOD = checked(b"GPGLL,4916.45,N,12311.12,W,225444,A")
TOKENS = (b"$", b"!", b"*", b"*00", b"\r\n$GP", b"!AIVDM,1,1,,A,", b"\xb5\x62\x01\x07", b"\\g:1-2-73874*4B\\", b"$,*2C")


def made_here() -> list[Seed]:
    """Sentences, the same glued and in binary company, lines of text that is no ASCII, one line that is too long."""
    lines = [checked(body) for body in BODIES] + [checked(b"AIVDM,1,1,,A,14eG;o@034o8sd<L9i:a;WF>062D,0", b"!")]
    text = "1.5;23,8 °C;ok\n".encode() + "т=1.5µs\r\n".encode() + b"n=17\r\rlatin \xe4\xf6\n\0\n"
    return [
        Seed("sentences", b"", b"\r\n".join(lines) + b"\r\n"),
        Seed("glued", b"", b"".join(lines)),
        Seed("ubx", b"", b"".join(b"\xb5\x62\x01\x07$!*" + line + b"\r\n" for line in lines)),
        Seed("text", b"", text * 20),
        Seed(
            "late",
            b"",
            b"".join(
                b"$GPTXT," + b"a" * size + checked(b"AIVDM,1,1,,A,14eG;o@034o8sd<L9i:a", b"!") + b"\r\n"
                for size in (1700, 1740, 1760)
            ),
        ),
        Seed("long", b"", "µ".encode() * 2000 + b"\n" + b"$GPTXT," + b"a" * 2000 + b"\n"),
    ]


def _seeds(corpus: Corpus) -> list[Seed]:
    return corpus.seeds(made_here, "serial/*")


def _draw_stream(corpus: Corpus) -> Strategies:
    return {
        "protocol": st.sampled_from(sorted(FRAMERS)),
        "data": mutated(_seeds(corpus), bytes_max=2500, tokens=TOKENS),
        "cuts": st.lists(st.integers(0, 5000), max_size=12),
    }


def check_stream(protocol: str, data: bytes, cuts: list[int]) -> None:
    """The same frames however the bytes come; every byte counted; stamps of the first byte; bounded; in step again."""
    singly = Fed(protocol, [data[at : at + 1] for at in range(len(data))])
    ends = sorted({min(cut, len(data)) for cut in cuts} | {len(data)})
    parts = [data[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]
    lumps = Fed(protocol, parts)
    whole = Fed(protocol, [data])
    assert singly.counters == lumps.counters == whole.counters
    starts, end = [frame.ts_ns for frame in singly.frames], 0
    part_of = [number for number, part in enumerate(parts) for _ in part]
    for frame, of_lumps, of_whole in zip(singly.frames, lumps.frames, whole.frames, strict=True):
        assert frame[1:] == of_lumps[1:] == of_whole[1:]
        assert frame.ts_ns >= end, "frames overlap"
        end = frame.ts_ns + len(frame.payload)
        assert data[frame.ts_ns : end] == frame.payload, "the stamp is not that of the first byte"
        assert of_lumps.ts_ns == part_of[frame.ts_ns]
        _check_frame(protocol, frame)
    assert starts == sorted(starts)
    end_of_frame, good = (b"\0", b"\x03ok\0") if protocol == "cobs" else (b"\r\n", GOOD)
    behind = Fed(protocol, [data + end_of_frame + good]).frames
    assert behind[-1].payload == good.rstrip(b"\0"), "not in step again"
    before = behind[:-1] if protocol != "cobs" else behind[: len(whole.frames)]  # A zero may end one more frame.
    assert [each.payload for each in before] == [each.payload for each in whole.frames]
    if protocol == "lines":
        _check_lines(data, whole.frames)


def _check_frame(protocol: str, frame: SerialFrame) -> None:
    assert 0 < len(frame.payload) <= PAYLOAD_BYTES_MAX
    assert frame.flags & SerialFlag.SERIAL
    is_message = protocol == "ubx" and frame.payload[:2] == SYNC
    is_binary = is_message or protocol == "cobs"
    assert bool(frame.flags & SerialFlag.TEXT) == (not is_binary and _is_text(frame.payload))
    if is_message:
        assert frame.payload[-2:] == checksum(frame.payload[2:-2])
    if protocol == "nmea":
        assert _SENTENCE.fullmatch(frame.payload)
        body, _, digits = frame.payload[1:].rpartition(b"*")
        assert reduce(xor, body) == int(digits, 16)


def _check_lines(data: bytes, frames: Sequence[SerialFrame]) -> None:
    lines = [line for line in re.split(rb"[\r\n]", data) if line]
    for line, frame in zip(lines, frames, strict=True):
        if frame.flags & SerialFlag.TRUNCATED:
            assert len(line) > PAYLOAD_BYTES_MAX >= len(frame.payload) > PAYLOAD_BYTES_MAX - 4
            assert line.startswith(frame.payload)
        else:
            assert line == frame.payload


def _is_text(payload: bytes) -> bool:
    try:
        return "\0" not in payload.decode()
    except UnicodeDecodeError:
        return False


class Fed:
    """What a framer makes of pieces, the number of each being its time."""

    def __init__(self, protocol: str, parts: Sequence[bytes]) -> None:
        framer = FRAMERS[protocol]()
        self.frames: list[SerialFrame] = []
        for number, part in enumerate(parts):
            self.frames += framer.feed(part, number)
            assert 0 <= _unaccounted(framer.counters) <= PAYLOAD_BYTES_MAX
        self.frames += framer.flush()
        self.counters = framer.counters
        assert self.counters["received_bytes"] == sum(map(len, parts))
        assert self.counters["frame_bytes"] == sum(len(frame.payload) for frame in self.frames)
        assert _unaccounted(self.counters) == 0


def _unaccounted(counters: dict[str, int]) -> int:
    """Bytes that the framer holds."""
    return counters["received_bytes"] - sum(counters[f"{what}_bytes"] for what in ("frame", "line_end", "skipped"))


def _draw_sentences(corpus: Corpus) -> Strategies:
    if corpus.name == "made_here":
        seeds = [Seed(f"{body[:6]!r}", b"", body) for body in BODIES]
    else:
        seeds = [Seed(seed.name, b"", body) for seed in _seeds(corpus) for body in _bodies(seed.body)]
    tokens = (b",", b",,,,", b"9" * 9, b"-", b"00", b"N", b"1e9", b"99")
    bodies = mutated(seeds, bytes_max=200, tokens=tokens)
    return {
        "payloads": st.lists(st.one_of(bodies, bodies.map(checked), bodies.map(checked)), max_size=8),
        "at": st.integers(0, 8),
    }


def _bodies(data: bytes) -> list[bytes]:
    found = re.findall(rb"[$!]([^$!*\r\n]+)\*[0-9A-F]{2}", data[:30_000])
    return list({body[:6]: body for body in found}.values())


def check_sentences(payloads: list[bytes], at: int) -> None:
    """Every frame is counted once; batches cut otherwise give the same samples; all of it can be stored."""
    frames = columns(
        "gps", [SerialFrame(n, each[:PAYLOAD_BYTES_MAX], SerialFlag.SERIAL) for n, each in enumerate(payloads)]
    )
    if not payloads:
        return
    whole = NmeaDecoder("gps").decode(frames)
    counts = whole.counts
    assert counts.frames == len(payloads) == counts.decoded + counts.unknown + counts.undecoded
    decoder = NmeaDecoder("gps")
    parts = [decoder.decode(frames[:at]), decoder.decode(frames[at:])]
    assert dict(samples([whole])) == dict(samples(parts))
    assert counts.signals == len(dict(samples([whole]))) == sum(part.counts.signals for part in parts)
    encode_signals(whole.batches, PLACEMENT)
    encode_frames([frames], PLACEMENT)


DECODERS: dict[str, Callable[[], FrameDecoder]] = {
    "nmea": lambda: NmeaDecoder("x"),
    "ubx": lambda: UbxDecoder("x"),
    "keyvalue": lambda: KeyValueDecoder("x", time_field="t"),
    "json": lambda: JsonDecoder("x", time_field="t"),
    "csv": lambda: CsvDecoder("x"),
    "cobs": lambda: CobsDecoder("x", fields=("a:u8", "b:f32*2", "c:u64"), crc="crc8"),
}
LINES = (
    Seed("pairs", b"", b'rpm=3100 t=81.5\ntemp:21.5,hum=40; s="a b"\nINFO: v = nan w=1e999 x=99999999999999999999\n'),
    Seed(
        "json",
        b"",
        b'{"a":{"b":1,"c":[1,2.5,"x"]},"t":"2026-11-25T10:00:00Z"}\n{"a":null,"d":1e999}\n{"\\ud800":"\\u0000"}\n' * 3,
    ),
    Seed(
        "table", b"", b'"Log 1"\nt\trpm\tTPS\ns\t1/min\t%\n1\t2\t3\n2,5\t\tnan\nt,a (s)\n1,"2"\n3,x\n# c;d\n1;2,5\n' * 2
    ),
    Seed("frames", b"", b"\x01\x01\x02\x07\0\x0e\x01\x02\x03\x04\x05\x06\x07\x08\x09\x0a\x0b\x0c\x0d\0" * 4),
)
SIGNS = (b'"', b"{", b"}", b"=", b"\t", b";", b"\0", b"nan", b"_")


def _draw_frames(corpus: Corpus) -> Strategies:
    return {
        "protocol": st.sampled_from(sorted(DECODERS)),
        "data": mutated(
            [*LINES, *_seeds(corpus)], bytes_max=1500, tokens=(*TOKENS, b'"', b"{", b"}", b"=", b"\t", b";", b"\0")
        ),
        "cuts": st.lists(st.integers(0, 100), max_size=3),
    }


def check_frames(protocol: str, data: bytes, cuts: list[int]) -> None:
    """Framed and decoded: every frame counted once; batches cut anywhere give the same samples; it can be stored."""
    framer = FRAMERS[protocol]()
    found = framer.feed(data, 0) + framer.flush()
    if not found:
        return
    frames = columns("x", [frame._replace(ts_ns=n) for n, frame in enumerate(found)])
    memory: Memory = {}
    whole = DECODERS[protocol]().decode(frames, memory)
    counts = whole.counts
    assert counts.frames == len(found) == counts.decoded + counts.unknown + counts.undecoded
    ends = sorted({min(cut, len(found)) for cut in cuts} | {len(found)})
    decoder, of_parts = DECODERS[protocol](), list[Decoded]()
    remembered: Memory = {}
    for begin, end in zip([0, *ends], ends, strict=False):
        if end > begin:
            of_parts.append(decoder.decode(frames[begin:end], remembered))
            remembered = json.loads(json.dumps(remembered))
    assert remembered == json.loads(json.dumps(memory))
    assert sorted(map(repr, samples([whole]))) == sorted(map(repr, samples(of_parts)))
    encode_signals(whole.batches, PLACEMENT)
    encode_frames([frames], PLACEMENT)


def samples(decoded: Sequence[Decoded]) -> Iterator[tuple[tuple[int, str, int], tuple[Any, ...]]]:
    """Every sample by group, channel and stamp: its bits, text and quality. Stamps of a batch rise."""
    for batch in (batch for each in decoded for batch in each.batches):
        assert batch.value.shape == (len(batch.group.channels), len(batch))
        stamps = batch.ts_ns.tolist()
        assert stamps == sorted(set(stamps))
        for row, channel in enumerate(batch.group.channels):
            for column, ts_ns in enumerate(stamps):
                text = None if batch.text is None else batch.text[row, column]
                quality = 0 if batch.quality is None else int(batch.quality[row, column])
                value = batch.value[row, column]
                yield (batch.group.id, channel.name, ts_ns), (b"" if value != value else value.tobytes(), text, quality)


TARGETS = (
    Target("serial_stream", _draw_stream, check_stream, examples=200),
    Target("serial_decoders", _draw_frames, check_frames, examples=200),
    Target("nmea_sentences", _draw_sentences, check_sentences, examples=100),
)
