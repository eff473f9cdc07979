"""Everything that comes from outside, mutated: serial bytes, frames, captures, configurations, journals."""

from __future__ import annotations

from typing import Final

from tests.property.fuzz import can_frames, captures, configuration, journals, serial_lines
from tests.property.fuzz.target import Target

TARGETS: Final[tuple[Target, ...]] = (
    *serial_lines.TARGETS,
    *can_frames.TARGETS,
    *captures.TARGETS,
    *configuration.TARGETS,
    *journals.TARGETS,
)
