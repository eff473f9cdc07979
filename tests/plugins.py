"""The plug-in of the documentation, as pip would install it."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "docs" / "examples" / "actisense"


def install_example(folder: Path, monkeypatch: pytest.MonkeyPatch | None = None) -> Path:
    """Install it into a folder, for this process if asked for: its module, and the entry points of its project."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    information = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    points = "".join(
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in entries.items())
        for group, entries in project["entry-points"].items()
    )
    (information / "entry_points.txt").write_text(points)
    for module in EXAMPLE.glob("*.py"):
        shutil.copy(module, folder)
    if monkeypatch is not None:
        monkeypatch.syspath_prepend(folder)
    return folder
