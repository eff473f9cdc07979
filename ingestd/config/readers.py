"""Readers: from what TOML gives for one key to the value that is meant, or to what is wrong with it.

A reader never raises: it reports to the `Place` it reads at and returns BAD, so that one mistake does not hide the
next. Readers know nothing of the structs that use them.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec

NAME_BYTES_MAX = 100
STANDARD_ID_MAX, EXTENDED_ID_MAX = 0x7FF, 0x1FFF_FFFF
PORT_MAX = 65_535
FILTERS_MAX = 512  # CAN_RAW_FILTER_MAX of the kernel, for one socket

SECONDS_OF = {
    "ns": Fraction(1, 10**9),
    "us": Fraction(1, 10**6),
    "µs": Fraction(1, 10**6),
    "ms": Fraction(1, 10**3),
    "s": Fraction(1),
    "min": Fraction(60),
    "h": Fraction(3600),
}
BYTES_OF = {
    "b": 1,
    **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", 1)},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", 1)},
}
_QUANTITY = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([a-zµA-Z]+)")
_HOST = re.compile(r"(\[[^\[\]]*\]|[^:\[\]]*)(:[0-9]{0,9})?")
_BCRYPT = re.compile(r"\$2[aby]\$(0[4-9]|1[0-4])\$[./A-Za-z0-9]{53}")
_FILTER = re.compile(r"(?:0x)?([0-9a-f]{1,8})(?:([:-])(?:0x)?([0-9a-f]{1,8}))?", re.IGNORECASE)


class _Bad:
    """The type of BAD."""

    def __repr__(self) -> str:
        return "BAD"


BAD: Final[Any] = _Bad()  # What a reader returns for a value that has been reported.


@dataclass(frozen=True, slots=True)
class Place:
    """A key of the file, and where mistakes about it are collected, one line each."""

    key: str
    folder: Path  # what relative paths are relative to
    mistakes: list[str]

    def wrong(self, problem: str, hint: str = "") -> Any:
        """Report what is wrong here and what to do; returns BAD."""
        said = f"{problem} ({hint})" if hint else problem
        said = f"{self.key}: {said}" if self.key else said
        # Keys and texts of the file are in it: a line end or an escape sequence must not look like one of ours.
        self.mistakes.append("".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in said))
        return BAD

    def __truediv__(self, key: str) -> Place:
        """The place of a key of the table that is here."""
        quoted = key if re.fullmatch(r"[\w-]+", key, re.ASCII) else f'"{key}"'
        return Place(f"{self.key}.{quoted}" if self.key else quoted, self.folder, self.mistakes)

    def __getitem__(self, index: int) -> Place:
        """The place of an element of the list that is here."""
        return Place(f"{self.key}[{index}]", self.folder, self.mistakes)


Reader = Callable[[Any, Place], Any]


class Address(msgspec.Struct, frozen=True):
    """Where to listen; an empty host is every address of the machine, port 0 one that is free."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Filter(msgspec.Struct, frozen=True):
    """The arbitration ids that agree with `id` in the bits set in `mask`; standard or extended ones, never both."""

    id: int
    mask: int
    extended: bool


def kind_of(value: Any) -> str:
    """What TOML calls it, with its article."""
    if isinstance(value, bool):
        return str(value).lower()
    names = {str: "a text", int: "a whole number", float: "a number", list: "a list", dict: "a table"}
    return names.get(type(value), "a date or time")


def suggestion(word: str, known: Iterable[str]) -> str:
    """The hint for a word that is not among the known ones."""
    known = sorted(known)
    near = difflib.get_close_matches(word.lower(), known, 1)
    return f'did you mean "{near[0]}"?' if near else "known: " + ", ".join(known)


def text(value: Any, at: Place) -> Any:
    """A text that PostgreSQL can store."""
    if not isinstance(value, str):
        return at.wrong(f"must be a text, not {kind_of(value)}", 'write it in quotes: "…"')
    if "\0" in value:
        return at.wrong("has a NUL character, which no database can store")
    return value


def device(value: Any, at: Place) -> Any:
    """What a driver calls a device: a text that is not empty."""
    return at.wrong("is empty", "name the device") if value == "" else text(value, at)


def source_name(value: Any, at: Place) -> Any:
    """The name of a source: short, printable, without "/", which comes before a sender (`can0/0x21`)."""
    if text(value, at) is BAD:
        return BAD
    if not value or value != value.strip() or not value.isprintable():
        return at.wrong(f"{value!r} cannot be a name", "use printable characters, without blanks at the ends")
    if "/" in value:
        return at.wrong(f'"{value}" has a "/", which stands between a source and a sender', 'use "-" or "."')
    if len(value.encode()) > NAME_BYTES_MAX:
        return at.wrong(f"is {len(value.encode())} bytes long", f"at most {NAME_BYTES_MAX}")
    return value


def flag(value: Any, at: Place) -> Any:
    """true or false."""
    return value if isinstance(value, bool) else at.wrong(f"must be true or false, not {kind_of(value)}")


def whole(low: int, high: int) -> Reader:
    """A reader of whole numbers from `low` to `high`."""

    def read(value: Any, at: Place) -> Any:
        if type(value) is not int:
            return at.wrong(f"must be a whole number, not {kind_of(value)}")
        if not low <= value <= high:
            return at.wrong(f"{value} is out of range", f"from {low} to {high}")
        return value

    return read


def choice(known: Iterable[Any], what: str) -> Reader:
    """A reader of one of the known values; `what` names such a value, with its article."""
    known = tuple(known)

    def read(value: Any, at: Place) -> Any:
        if isinstance(value, str) and all(isinstance(one, str) for one in known):
            return value if value in known else at.wrong(f'"{value}" is not {what}', suggestion(value, known))
        # 1 == 1.0 == True: a flag is not a number here.
        if not isinstance(value, bool) and value in known:
            return value
        shown = f'"{value}"' if isinstance(value, str) else kind_of(value) if type(value) is not int else str(value)
        return at.wrong(f"{shown} is not {what}", "known: " + ", ".join(map(str, known)))

    return read


def _quantity(value: Any, units: Mapping[str, int] | Mapping[str, Fraction]) -> Fraction | None:
    match = _QUANTITY.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None or match[2] not in units:
        return None
    return Fraction(match[1]) * units[match[2]]


def duration(low: str, high: str) -> Reader:
    """A reader of durations with a unit, such as "100ms", in seconds."""
    low_seconds, high_seconds = _quantity(low, SECONDS_OF), _quantity(high, SECONDS_OF)
    assert low_seconds is not None
    assert high_seconds is not None

    def read(value: Any, at: Place) -> Any:
        seconds = _quantity(value, SECONDS_OF)
        if seconds is None:
            shown = f'"{value}"' if isinstance(value, str) else kind_of(value)
            return at.wrong(f"{shown} is not a duration", 'write a number and a unit, as in "100ms", "2s" or "1min"')
        if not low_seconds <= seconds <= high_seconds:
            return at.wrong(f"{value} is out of range", f"from {low} to {high}")
        return float(seconds)

    return read


def size(low: str, high: str) -> Reader:
    """A reader of sizes with a unit, such as "8GiB" or "500MB", in bytes."""
    low_bytes, high_bytes = _quantity(low.lower(), BYTES_OF), _quantity(high.lower(), BYTES_OF)
    assert low_bytes is not None
    assert high_bytes is not None

    def read(value: Any, at: Place) -> Any:
        count = _quantity(value.lower(), BYTES_OF) if isinstance(value, str) else None
        if count is None:
            shown = f'"{value}"' if isinstance(value, str) else kind_of(value)
            return at.wrong(f"{shown} is not a size", 'write a number and a unit, as in "500MB" or "8GiB"')
        if not low_bytes <= count <= high_bytes:
            return at.wrong(f"{value} is out of range", f"from {low} to {high}")
        return int(count)

    return read


def address(value: Any, at: Place) -> Any:
    """host:port, [IPv6]:port, :port or "off", which is None."""
    if value == "off" or value is False:
        return None
    hint = 'write "127.0.0.1:9464", ":9464" for every address, or "off"'
    if not isinstance(value, str):
        return at.wrong(f"must be a text, not {kind_of(value)}", hint)
    host, colon, port = value.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    if not colon or not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65535 or (bracketed != (":" in host)):
        return at.wrong(f'"{value}" is not an address to listen at', hint)
    return Address(host, int(port))


def postgres_dsn(value: Any, at: Place) -> Any:
    """The address of a database as URL. What is wrong with it is said without showing it: it may hold a password."""
    hint = "it looks like postgresql://user@host:5432/name"
    if text(value, at) is BAD:
        return BAD
    try:
        parts = urlsplit(value)
    except ValueError:
        return at.wrong("is not an address of a database", hint)
    if parts.scheme not in ("postgresql", "postgres") or not value.startswith(f"{parts.scheme}://"):
        return at.wrong("is not an address of a database", hint)
    # Otherwise a part of a password would be taken for something that may be shown.
    hosts = parts.netloc.rpartition("@")[2].split(",")
    split = parts.fragment or "@" in parts.path or parts.netloc.count("@") > 1 or "?" in parts.query
    split = split or ("@" in parts.query and "@" not in parts.netloc)
    if split or not all(map(_is_host, hosts)):
        hint = "in a user, a password or a name write / as %2F, ? as %3F, # as %23, @ as %40, : as %3A"
        return at.wrong("is not an address of a database, or has signs in it that mean something else", hint)
    return value


def _is_host(text: str) -> bool:
    """A host with its port, either of which may be missing."""
    found = _HOST.fullmatch(text)
    return found is not None and int((found[2] or "").lstrip(":") or 0) <= PORT_MAX


def path_in_folder(value: Any, at: Place) -> Any:
    """A path; a relative one is taken from the folder of the configuration, `~` is the home of the user."""
    if text(value, at) is BAD:
        return BAD
    if not value:
        return at.wrong("is empty", "write a path")
    try:
        return (at.folder / Path(value).expanduser()).absolute()
    except RuntimeError:
        return at.wrong(f'"{value}": there is no such user')


def password_hashes(value: Any, at: Place) -> Any:
    """A table of names and bcrypt hashes."""
    if not isinstance(value, dict):
        return at.wrong(f"must be a table, not {kind_of(value)}", 'write { name = "$2b$…" }')
    mistakes_before = len(at.mistakes)
    for name, hashed in value.items():
        if not name or ":" in name:
            (at / name).wrong("is no name of a user", "write one that is not empty and has no colon")
        if not isinstance(hashed, str) or not _BCRYPT.fullmatch(hashed):
            # Not shown: it may be the password.
            (at / name).wrong("is not the hash of a password", "`ingestd hash-password` makes one")
    return BAD if len(at.mistakes) > mistakes_before else value


def scalars(value: Any, at: Place) -> Any:
    """A table of texts, numbers, true and false, handed on as it is."""
    if not isinstance(value, dict):
        return at.wrong(f"must be a table, not {kind_of(value)}", "write { key = value }")
    read = [_scalar(one, at / key) for key, one in value.items()] + [text(key, at / key) for key in value]
    return BAD if any(one is BAD for one in read) else value


def _scalar(value: Any, at: Place) -> Any:
    if isinstance(value, str):
        return text(value, at)
    if isinstance(value, float) and not math.isfinite(value):
        return at.wrong(f"is {value}, which is no number to work with")
    if isinstance(value, int | float):
        return value
    return at.wrong(f"must be a text, a number, true or false, not {kind_of(value)}")


def listing(read_one: Reader) -> Reader:
    """A reader of lists."""

    def read(value: Any, at: Place) -> Any:
        if not isinstance(value, list):
            return at.wrong(f"must be a list, not {kind_of(value)}", "write [ … ]")
        values = [read_one(one, at[index]) for index, one in enumerate(value)]
        return BAD if any(one is BAD for one in values) else tuple(values)

    return read


def filters(value: Any, at: Place) -> Any:
    """ "none", "databases", or the ids to record: numbers, or hexadecimal texts "7E8", "700-7FF", "123:7F0".

    As candump has it, id:mask compares the bits set in the mask. An id of more than three digits, or beyond 7FF, is an
    extended one. A range becomes as few pairs of id and mask as can be.
    """
    if value in ("none", "databases"):
        return value
    hint = 'write "none", "databases" or a list such as ["7E8", "700-7FF", "123:7F0", 0x18FEF100]'
    if not isinstance(value, list):
        return at.wrong(f'"{value}" is not a filter' if isinstance(value, str) else f"is {kind_of(value)}", hint)
    if not value:
        return at.wrong("is an empty list: nothing would be recorded", hint)
    found = [_filter(one, at[index], hint) for index, one in enumerate(value)]
    if any(one is BAD for one in found):
        return BAD
    flat = tuple(one for several in found for one in several)
    if len(flat) > FILTERS_MAX:
        return at.wrong(f"is {len(flat)} pairs of id and mask", f"the kernel takes {FILTERS_MAX}: use wider ones")
    return flat


def _filter(value: Any, at: Place, hint: str) -> Any:
    if type(value) is int and 0 <= value <= EXTENDED_ID_MAX:
        extended = value > STANDARD_ID_MAX
        return (Filter(value, EXTENDED_ID_MAX if extended else STANDARD_ID_MAX, extended),)
    match = _FILTER.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        return at.wrong(f"{value!r} is not an id, a range or id:mask", hint)
    first, last = int(match[1], 16), int(match[3] or match[1], 16)
    extended = max(len(match[1]), len(match[3] or "")) > 3 or max(first, last) > STANDARD_ID_MAX
    highest = EXTENDED_ID_MAX if extended else STANDARD_ID_MAX
    if max(first, last) > highest:
        return at.wrong(f"{value!r}: an id has at most 29 bits", "at most 1FFFFFFF")
    if match[2] == ":":
        return (Filter(first & last, last, extended),)
    if first > last:
        return at.wrong(f"{value!r}: the range goes backwards", f'write "{match[3]}-{match[1]}"')
    return tuple(_covering(first, last, highest, extended))


def _covering(first: int, last: int, highest: int, extended: bool) -> list[Filter]:
    """Pairs of id and mask for a range: each the largest aligned block that begins where the last one ended."""
    pairs = []
    while first <= last:
        block = first & -first or highest + 1
        while block > last - first + 1:
            block >>= 1
        pairs.append(Filter(first, highest & ~(block - 1), extended))
        first += block
    return pairs
