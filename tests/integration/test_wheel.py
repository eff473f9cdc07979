"""The package as a user gets it: built, installed into an empty environment, importing a capture.

Builds the source distribution and the wheel from it, so a file missing from either shows here. Needs the package
registry or its cache, and fails without: a release that cannot be installed is not one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from ingestd import demo

ROOT = Path(__file__).parents[2]
CAPTURE_SECONDS = 5

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.xdist_group("wheel")]


def run(*command: str | Path, cwd: Path) -> str:
    """What a command prints, or a failure that shows all it said. It sees no package of ours but the installed one."""
    environment = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, f"{' '.join(map(str, command))}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def scripts(distributions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of commands of an environment that holds the wheel, what it requires, and nothing else."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=True)
    scripts = folder / ("Scripts" if os.name == "nt" else "bin")
    (wheel,) = distributions.glob("*.whl")
    constraints = ROOT / "constraints.txt"
    run(scripts / "python", "-m", "pip", "install", "-q", "-c", constraints, f"{wheel}[embedded]", cwd=folder)
    return scripts


def test_wheel_carries_schema_migrations_and_demo(distributions: Path) -> None:
    """Everything the installed program reads at run time is inside, and nothing that a build left behind."""
    (wheel,) = distributions.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    versions = {path.name for path in (ROOT / "migrations").rglob("*.py")}
    assert versions, "there is nothing to migrate"
    assert versions <= {Path(name).name for name in names if name.startswith("ingestd/migrations/")}
    assert {"ingestd/schema.sql", "ingestd/cli/__init__.py", "ingestd/py.typed"} <= names
    assert {f"ingestd/page/{path.name}" for path in (ROOT / "ingestd" / "page").iterdir()} <= names
    assert {f"ingestd/demo/{path.name}" for path in demo.databases().values()} <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith(("tests", "migrations"))]
    assert [name for name in names if name.endswith("licenses/LICENSE")]


def test_source_distribution_can_be_tested(distributions: Path) -> None:
    """Whoever packages us for a distribution finds the schema, the tests and the licence."""
    (archive,) = distributions.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    assert {"schema.sql", "LICENSE", "README.md", "Makefile", "constraints.txt", "tests/unit/test_tidy.py"} <= names
    assert not [name for name in names if name.startswith((".venv", ".git/"))]


def test_installed_program_imports_a_capture(scripts: Path, migrated: str, tmp_path: Path) -> None:
    """From an empty environment to stored signals, away from the source tree; and once more, which changes nothing."""
    capture = tmp_path / "drive.log"
    frames_count = demo.write_capture(capture, CAPTURE_SECONDS)
    databases = [f"--dbc={bus}:{path}" for bus, path in demo.databases().items()]
    command = [scripts / "ingestd", "import", capture, *databases, "--dsn", migrated, "--json"]

    summary = json.loads(run(*command, cwd=tmp_path))
    assert summary["frames"] == frames_count
    assert summary["decoded_frames"] == frames_count
    assert summary["unknown_frames"] == summary["damaged"] == summary["short_frames"] == 0
    assert summary["signals"] > 3 * frames_count
    again = json.loads(run(*command, cwd=tmp_path))
    assert again["session_id"] == summary["session_id"]

    home = run(scripts / "python", "-c", "import ingestd; print(ingestd.__file__)", cwd=tmp_path)
    assert Path(home).is_relative_to(scripts.parent), "the program under test is the installed one"
