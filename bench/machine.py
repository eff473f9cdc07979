"""What a benchmark was run on: for the table's head, because a figure without it says nothing."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("ingestd", "numpy", "asyncpg", "uvloop", "python-can", "cantools", "asammdf", "sqlalchemy")


def facts() -> dict[str, str]:
    """Date, processor, memory, system and versions."""
    model = [line for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = [line.split()[1] for line in _lines("/proc/meminfo") if line.startswith("MemTotal")]
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "processor": f"{os.cpu_count()} cores, {model[0].partition(': ')[2] if model else platform.machine()}",
        "memory": f"{int(memory[0]) / 2**20:.0f} GiB" if memory else "?",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def line() -> str:
    """The same in a line."""
    known = facts()
    heads = ", ".join(known.pop(name) for name in ("date", "processor", "memory", "system"))
    return f"{heads}; Python {known.pop('python')}, {', '.join(f'{name} {of}' for name, of in known.items())}"


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
