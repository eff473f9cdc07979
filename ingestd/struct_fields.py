"""The fields of a little struct as a line of the configuration says them: `rpm:u16*0.25:1/min`.

name:kind, with [count] for an array, *factor and +offset for what the number means, and :unit, each where it is needed.
Kinds are u8, u16, u32, u64, i8 … i64, f32, f64. A field with the name `_` is room that nobody looks at.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

KINDS: Final = {f"{sign}{bits}": bits // 8 for sign in "ui" for bits in (8, 16, 32, 64)} | {"f32": 4, "f64": 8}
COUNT_MAX: Final = 255
PADDING: Final = "_"

_NUMBER: Final = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
_FIELD: Final = re.compile(
    rf"\s*([^\s:]+)\s*:\s*([a-z]+[0-9]*)\s*(?:\[([0-9]{{1,4}})\])?"
    rf"\s*(?:\*\s*(-?{_NUMBER}))?\s*(?:([+-])\s*({_NUMBER}))?\s*(?::\s*(\S.*?))?\s*"
)


class StructField(NamedTuple):
    """One field: where it begins follows from those before it."""

    name: str
    kind: str  # a key of KINDS
    repeats: int = 1
    is_array: bool = False
    factor: float | None = None
    offset: float | None = None
    unit: str | None = None

    @property
    def size(self) -> int:
        """Bytes in the struct."""
        return KINDS[self.kind] * self.repeats

    @property
    def names(self) -> list[str]:
        """Of its channels; an array's are numbered from 0."""
        if self.name == PADDING:
            return []
        return [f"{self.name}.{number}" for number in range(self.repeats)] if self.is_array else [self.name]

    @staticmethod
    def parse(text: str) -> StructField:
        """From the configuration. Raises ValueError with what is wrong."""
        found = _FIELD.fullmatch(text)
        if found is None:
            raise ValueError("is not a field")
        name, kind, count, factor, sign, offset, unit = found.groups()
        if kind not in KINDS:
            raise ValueError(f'has the kind "{kind}", and there are ' + ", ".join(KINDS))
        if count is not None and not 1 <= int(count) <= COUNT_MAX:
            raise ValueError(f"has {count} elements, and there may be 1 to {COUNT_MAX}")
        return StructField(
            name, kind, int(count or 1), count is not None, None if factor is None else float(factor),
            None if offset is None else float(sign + offset), unit,
        )  # fmt: skip
