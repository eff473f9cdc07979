"""Lines of key and value, and of JSON, to signals: bytes in, values out."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ingestd.chunks import Placement, encode_signals
from ingestd.decode.can import Decoded
from ingestd.decode.keyed import KEYS_MAX, JsonDecoder, KeyedDecoder, KeyValueDecoder
from ingestd.decode.scalars import utc_of
from ingestd.framing import LineFramer, SerialFrame
from ingestd.model import ClockState, FrameBatch, Memory, Quality, SerialFlag
from ingestd.sources.serial import columns

PLACEMENT = Placement(UUID(int=1), 0, ClockState.SET)


def batch(*lines: bytes, first: int = 0) -> FrameBatch:
    """Lines a nanosecond apart."""
    return columns("ecu", [SerialFrame(n, line, SerialFlag.SERIAL) for n, line in enumerate(lines, first)])


def samples(decoded: Decoded) -> Iterator[tuple[int, str, float | None, str | None, int]]:
    """Stamp, channel, number, text, quality of every sample."""
    for each in decoded.batches:
        for row, channel in enumerate(each.group.channels):
            for column, ts_ns in enumerate(each.ts_ns.tolist()):
                value = float(each.value[row, column])
                text = None if each.text is None else each.text[row, column]
                quality = 0 if each.quality is None else int(each.quality[row, column])
                yield ts_ns, channel.name, None if math.isnan(value) else value, text, quality


def values(decoded: Decoded) -> list[dict[str, float | str]]:
    """What there is of each line: number, else text, by channel."""
    found: dict[int, dict[str, float | str]] = {}
    for ts_ns, channel, value, text, _ in samples(decoded):
        of_line = found.setdefault(ts_ns, {})
        if value is not None or text is not None:
            of_line[channel] = value if value is not None else str(text)
    return [found[ts_ns] for ts_ns in sorted(found)]


def keyvalue(*lines: bytes, memory: Memory | None = None) -> Decoded:
    return KeyValueDecoder("ecu").decode(batch(*lines), {} if memory is None else memory)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"rpm=3100 t=81.5", {"rpm": 3100, "t": 81.5}),
        (b"temp:21.5,hum:40", {"temp": 21.5, "hum": 40}),
        (b"Temperature: 21.5 C, Humidity: 40 %", {"Temperature": 21.5, "Humidity": 40}),
        (b"rpm = 3100; t = -4e-1 |s=+.5", {"rpm": 3100, "t": -0.4, "s": 0.5}),
        (b'state="a b, c=1" n=1', {"state": "a b, c=1", "n": 1}),
        (rb'say="he said \"no\"" n=1', {"say": 'he said "no"', "n": 1}),
        (b"INFO: rpm=5", {"rpm": 5}),
        (b"12:30:01 rpm=5", {"rpm": 5}),
        (b"t=12:30:01 v=1_000 w=0x1F", {"t": "12:30:01", "v": "1_000", "w": "0x1F"}),
        ("\u00f6l=3 temp_\u00b0C=4".encode(), {"\u00f6l": 3, "temp_\u00b0C": 4}),
        (b"a=1 a=2", {"a": 2}),
        (b"temp: rpm: 3000", {"rpm": 3000}),
        (b"a=nan b= c=1", {"c": 1}),
        (b"a=inf b=1e999 c=1", {"c": 1}),
    ],
)
def test_pairs(line: bytes, expected: dict[str, Any]) -> None:
    """What people print as key and value is read as they mean it."""
    decoded = keyvalue(line)
    assert values(decoded) == [expected]
    assert decoded.counts.decoded == 1


@pytest.mark.parametrize("line", [b"hello", b"=", b"a", b"1=2", b":::", b'a="open', b"x" * 1785, b"a " * 800])
def test_lines_without_pairs_are_unknown(line: bytes) -> None:
    """A greeting is no measurement."""
    assert keyvalue(line).counts.unknown == 1


@pytest.mark.parametrize("line", [b"a=\xff", b"a=\0"])
@pytest.mark.parametrize("decoder", [KeyValueDecoder, JsonDecoder])
def test_what_is_no_text_is_not_decoded(line: bytes, decoder: type[KeyedDecoder]) -> None:
    """Neither NUL nor broken UTF-8 comes through, and none of them stops the next line."""
    decoded = decoder("ecu").decode(batch(line, b'a=1 {"a": 1}', b'{"a": 1}'), {})
    assert decoded.counts.undecoded == 1
    assert decoded.counts.decoded >= 1


def test_json_is_flat_and_numbers_are_numbers() -> None:
    """Nested keys become a.b, elements a.0, true and false 1 and 0, null nothing."""
    line = b'{"a":{"b":1.5,"c":{"d":"x"}},"acc":[1,-2,3e0],"on":true,"off":false,"none":null,"t":""}'
    decoded = JsonDecoder("imu").decode(batch(line), {})
    assert values(decoded) == [{"a.b": 1.5, "a.c.d": "x", "acc.0": 1, "acc.1": -2, "acc.2": 3, "on": 1, "off": 0}]
    assert {name: quality for _, name, _, _, quality in samples(decoded) if quality} == {"none": 2, "t": 2}
    assert [each.group.source for each in decoded.batches] == ["imu"]


@pytest.mark.parametrize(
    ("line", "count"),
    [
        (b"booting ...", "unknown"),
        (b"[1,2]", "unknown"),
        (b'"text"', "unknown"),
        (b'{"a":1', "undecoded"),
        (b'{"a":1}}', "undecoded"),
        (b'{"a":nan}', "undecoded"),
        (b'{"a":' * 300 + b"1" + b"}" * 300, "undecoded"),
        (b'{"a":' + b"[" * 1700, "undecoded"),
        (b"{}", "decoded"),
    ],
)
def test_what_is_no_json(line: bytes, count: str) -> None:
    """Everything is counted once, and nothing raises."""
    assert getattr(JsonDecoder("imu").decode(batch(line), {}).counts, count) == 1


@pytest.mark.parametrize(
    ("spelt", "value", "text", "quality"),
    [
        (b"9007199254740993", 9007199254740992.0, "9007199254740993", 0),
        (b"-18446744073709551617", -18446744073709551616.0, "-18446744073709551617", 0),
        (b"9007199254740992", 9007199254740992.0, None, 0),
        (b"1" + b"0" * 400, None, "1" + "0" * 400, Quality.OUT_OF_RANGE),
        (b"1e999", None, None, Quality.OUT_OF_RANGE),
        (b"NaN", None, None, Quality.NOT_AVAILABLE),
        (b'"a\\u0000b\\ud800"', None, "a\ufffdb\ufffd", 0),
    ],
)
def test_values_that_float8_and_text_cannot_hold(spelt: bytes, value: float, text: str, quality: int) -> None:
    """Large whole numbers keep their digits; what cannot be stored is said in the quality, and the batch is written."""
    decoded = JsonDecoder("imu").decode(batch(b'{"a\\u0000":' + spelt + b',"b":1}'), {})
    assert list(samples(decoded)) == [(0, "a\ufffd", value, text, quality), (0, "b", 1.0, None, 0)]
    encode_signals(decoded.batches, PLACEMENT)
    if spelt[:1] != b'"':
        [first] = samples(keyvalue(b"a=" + spelt))
        assert first == (0, "a", value, text, quality)


def test_optional_keys_do_not_multiply_groups() -> None:
    """Eight keys that come and go in every combination give nine groups at most, and none after a restart."""
    lines = [json.dumps({"t": n} | {f"k{bit}": n for bit in range(8) if n >> bit & 1}).encode() for n in range(256)]
    memory: Memory = {}
    decoded = JsonDecoder("imu").decode(batch(*lines), memory)
    groups = {each.group.id for each in decoded.batches}
    assert len(groups) == 9
    assert values(decoded) == [json.loads(line) for line in lines]
    restarted = JsonDecoder("imu").decode(batch(*lines), json.loads(json.dumps(memory)))
    assert {each.group.id for each in restarted.batches} == {decoded.batches[-1].group.id}
    assert values(restarted) == values(decoded)


def test_many_keys_are_several_groups_of_which_only_the_last_grows() -> None:
    """A new key leaves the full groups as they are, and a line is a frame only of groups that it has a key of."""
    first = {f"k{n}": n for n in range(40)}
    lines = [first, first | {"new": 1}, {"new": 2}]
    decoded = JsonDecoder("imu").decode(batch(*(json.dumps(line).encode() for line in lines)), {})
    sizes = [(len(each.group.channels), len(each), each.ts_ns.tolist()) for each in decoded.batches]
    assert sizes == [(32, 1, [0]), (8, 1, [0]), (32, 1, [1]), (9, 2, [1, 2])]
    assert len({each.group.id for each in decoded.batches}) == 3
    assert values(decoded) == lines


def test_keys_without_end_are_bounded(caplog: pytest.LogCaptureFixture) -> None:
    """A device that says its time as a key fills neither memory nor database; what it says besides is decoded.

    That there are keys which are not is said once.
    """
    lines = [b'{"%d":1,"rpm":%d}' % (n + 10**9, n) for n in range(2000)]
    memory: Memory = {}
    decoded = JsonDecoder("imu").decode(batch(*lines), memory)
    assert len(memory["json"]) == KEYS_MAX
    assert sum("rpm" in line for line in values(decoded)) == 2000
    assert [record.getMessage().split(" hint=")[0] for record in caplog.records] == [
        "more than 512 keys: this one and further ones are in the raw frames only source=imu key='1000000511'"
    ]


def test_a_channel_may_change_its_type() -> None:
    """Number, text and number again is one channel of one group."""
    decoded = keyvalue(b"t=81.5", b"t=open", b"t=82")
    assert [each.group.id for each in decoded.batches] == [decoded.batches[0].group.id]
    assert values(decoded) == [{"t": 81.5}, {"t": "open"}, {"t": 82}]


@pytest.mark.parametrize(
    ("spelt", "expected"),
    [
        ('"2026-11-25T10:00:00Z"', 1795600800.0),
        ('"2026-11-25T12:00:00.25+02:00"', 1795600800.25),
        ('"2026-11-25 10:00:00"', 1795600800.0),
        ("1795600800", 1795600800.0),
        ("1795600800250", 1795600800.25),
        ("1795600800250000", 1795600800.25),
        ("1795600800250000000", 1795600800.25),
        ("12345", None),
        ('"noon"', None),
        ("true", None),
        ("1e999", None),
    ],
)
def test_the_time_field_is_seconds_since_1970(spelt: str, expected: float | None) -> None:
    """Whatever the device counts or spells; what is no such time is none, and stamps stay as they were."""
    decoded = JsonDecoder("imu", time_field="at.t").decode(batch(b'{"at":{"t":%s}}' % spelt.encode(), first=7), {})
    assert [(ts_ns, value) for ts_ns, _, value, _, _ in samples(decoded)] == [(7, expected)]
    assert decoded.batches[0].group.channels[0].unit == "s"
    assert utc_of(math.nan) is None


KEYS = st.sampled_from(["a", "b", "c.d", "\u00f6", "", "a\0", "\ud800"])
OBJECTS = st.dictionaries(
    KEYS,
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.integers()),
    max_size=4,
)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.one_of(OBJECTS.map(lambda one: json.dumps(one).encode()), st.binary(max_size=40)), max_size=12),
    st.integers(0, 12),
)
@pytest.mark.parametrize("decoder", [KeyValueDecoder, JsonDecoder])
def test_any_lines_cut_anywhere(decoder: type[KeyedDecoder], lines: Sequence[bytes], at: int) -> None:
    """Every line is counted once, batches cut otherwise give the same samples, and all of it can be stored."""
    framer = LineFramer()
    frames = [frame for n, line in enumerate(lines) for frame in framer.feed(line + b"\n", n)]
    if not frames:
        return
    whole_batch = columns("ecu", [frame._replace(ts_ns=n) for n, frame in enumerate(frames)])
    memory: Memory = {}
    whole = decoder("ecu").decode(whole_batch, memory)
    counts = whole.counts
    assert counts.frames == len(frames) == counts.decoded + counts.unknown + counts.undecoded
    parted: Memory = {}
    parts = [decoder("ecu").decode(part, parted) for part in (whole_batch[:at], whole_batch[at:]) if len(part)]
    assert parted == memory
    # Texts compare as they are; NaN never equals itself and is None here.
    assert sorted(map(repr, samples(whole))) == sorted(repr(each) for part in parts for each in samples(part))
    encode_signals(whole.batches, PLACEMENT)
    json.dumps(memory).encode()


def test_the_first_line_may_be_the_rest_of_one() -> None:
    """The end of a pair is no key: what had its beginning before the port was opened is recorded and not decoded."""
    framer = LineFramer()
    frames = framer.feed(b"pm=3100 t=81.5\nrpm=3100 t=81.5\n", 0)
    decoded = KeyValueDecoder("ecu").decode(columns("ecu", frames), {})
    assert (decoded.counts.undecoded, decoded.counts.decoded) == (1, 1)
    assert [channel.name for each in decoded.batches for channel in each.group.channels] == ["rpm", "t"]
    objects = LineFramer().feed(b'{"a":1}\n{"a":2}\n', 0)
    assert JsonDecoder("imu").decode(columns("imu", objects), {}).counts.decoded == 2
