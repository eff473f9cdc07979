"""Bytes that were good once: seeds, and what wires, disks, editors and people do to them.

A seed is a file of the data set, of the demo, or one made here. `mutated` takes a window of one and flips, cuts,
inserts, duplicates, splices and overwrites. Everything drawn is small and shrinks: a failure is shown as the shortest
bytes that still fail.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
from hypothesis import strategies as st

DATA: Final = Path(os.environ.get("INGESTD_TEST_DATA", Path(__file__).parents[4] / "shared" / "data"))

# What parsers of numbers, lines and texts trip over.
TOKENS: Final = (
    b"\n", b"\r", b"\r\n", b"\0", b" ", b"\t", b",", b";", b"#", b"*", b"$", b"!", b"-1", b"0", b".", b"1e999", b"nan",
    b"inf", b"9" * 20, b"9" * 5000, b"\xff", b"\xef\xbb\xbf", b"\xe2\x82", "٣".encode(), "²".encode(), "_1".encode(),
    b"x" * 1800, b"A" * 4200, b"\xff\xff\xff\xff", b"\0\0\0\x80", b"\xff\xff\xff\x7f",
)  # fmt: skip
PIECE_BYTES_MAX: Final = 400
CHANGES_MAX: Final = 6
FAR: Final = 1 << 20  # Places are drawn up to here, and taken modulo what there is.


@dataclass(frozen=True, slots=True)
class Seed:
    """Something to mutate: `head` is always in it, of `body` a window."""

    name: str
    head: bytes
    body: bytes = b""

    def __repr__(self) -> str:
        return f"<Seed {self.name}>"

    def window(self, start: int, size: int) -> bytes:
        """The head and whole lines of the body from a place on, or what there is if it has none."""
        begin = self.body.rfind(b"\n", 0, start % (len(self.body) + 1)) + 1
        return self.head + self.body[begin : begin + size]


@dataclass(frozen=True, slots=True)
class Corpus:
    """Where seeds come from. The data set is not everywhere, CI has it; the others always run."""

    name: str

    def __repr__(self) -> str:
        return self.name

    def require(self) -> None:
        """Skip the test that runs where the seeds are not."""
        if self is SHARED and not DATA.is_dir():
            assert not os.environ.get("CI"), "CI must have the data set"
            pytest.skip(f"no captures in {DATA}: set INGESTD_TEST_DATA")

    def seeds(self, made_here: Callable[[], Iterable[Seed]], *patterns: str, head_lines: int = 0) -> list[Seed]:
        """The seeds that are made here, or the files of the data set that fit the patterns, cut behind their header."""
        if self is MADE_HERE:
            return list(made_here())
        paths = sorted({path for pattern in patterns for path in DATA.glob(pattern) if path.is_file()})
        return [read(path, head_lines) for path in paths]


MADE_HERE: Final = Corpus("made_here")
SHARED: Final = Corpus("shared")
CORPORA: Final = (MADE_HERE, SHARED)


def read(path: Path, head_lines: int) -> Seed:
    """A seed from a file; of a binary one (`head_lines` is negative) all of it is head."""
    content = path.read_bytes()
    lines = content.split(b"\n", head_lines) if head_lines >= 0 else []
    body = lines[head_lines] if len(lines) > head_lines >= 0 else b""
    return Seed(path.name, content[: len(content) - len(body)], body)


def _flip(data: bytearray, at: int, more: int, piece: bytes) -> None:
    if data:
        data[at % len(data)] ^= 1 << more % 8


def _overwrite(data: bytearray, at: int, more: int, piece: bytes) -> None:
    at %= len(data) + 1
    data[at : at + len(piece)] = piece


def _insert(data: bytearray, at: int, more: int, piece: bytes) -> None:
    at %= len(data) + 1
    data[at:at] = piece


def _cut(data: bytearray, at: int, more: int, piece: bytes) -> None:
    at %= len(data) + 1
    del data[at : at + more % PIECE_BYTES_MAX]


def _end(data: bytearray, at: int, more: int, piece: bytes) -> None:
    del data[at % (len(data) + 1) :]


def _zero(data: bytearray, at: int, more: int, piece: bytes) -> None:
    at %= len(data) + 1
    data[at : at + more % PIECE_BYTES_MAX] = bytes(len(data[at : at + more % PIECE_BYTES_MAX]))


def _duplicate(data: bytearray, at: int, more: int, piece: bytes) -> None:
    at %= len(data) + 1
    data[at:at] = data[at : at + more % PIECE_BYTES_MAX]


def _move(data: bytearray, at: int, more: int, piece: bytes) -> None:
    at %= len(data) + 1
    moved = data[at : at + PIECE_BYTES_MAX]
    del data[at : at + PIECE_BYTES_MAX]
    _insert(data, more, 0, bytes(moved))


_CHANGES: Final = (_flip, _overwrite, _insert, _cut, _end, _zero, _duplicate, _move)
_places = st.integers(0, FAR)


def pieces(tokens: Sequence[bytes] = (), seeds: Sequence[Seed] = ()) -> st.SearchStrategy[bytes]:
    """What is put into others: a few bytes, a token, a part of another seed."""
    known = [st.binary(max_size=12), st.sampled_from([*tokens, *TOKENS])]
    if seeds:
        known.append(st.builds(_part, st.sampled_from(seeds), _places, st.integers(0, PIECE_BYTES_MAX)))
    return st.one_of(known)


def _part(seed: Seed, at: int, size: int) -> bytes:
    whole = seed.head + seed.body
    at %= len(whole) + 1
    return whole[at : at + size]


@st.composite
def mutated(draw: st.DrawFn, seeds: Sequence[Seed], *, bytes_max: int = 3000, tokens: Sequence[bytes] = ()) -> bytes:
    """A window of `bytes_max` bytes of a seed with up to six changes."""
    seed = draw(st.sampled_from(seeds))
    data = bytearray(seed.window(draw(_places), draw(st.integers(0, bytes_max))))
    change = st.tuples(st.sampled_from(_CHANGES), _places, _places, pieces(tokens, seeds))
    for apply, at, more, piece in draw(st.lists(change, max_size=CHANGES_MAX)):
        apply(data, at, more, piece)
    return bytes(data)
