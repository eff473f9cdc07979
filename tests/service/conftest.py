"""These tests need systemd as the init of a kernel of their own; tests/integration/test_own_kernel.py gives it to them.

ingestd is installed there as docs/operations.md says, but for what pip would fetch: the packages are those of the
virtual environment that runs the tests, and ingestd is a copy of what is tested, laid out as in its wheel.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from ingestd.daemon.unit_files import hidden
from tests.can_bus.bus import Bus
from tests.recorder import Instrument
from tests.service.unit import Unit, systemctl

ROOT = Path(__file__).parents[2]
PREFIX = Path("/opt/ingestd")
PYTHON = Path("/opt/python")
INSTRUMENTS = Path("/run/instruments")


@pytest.fixture(scope="session", autouse=True)
def _own_systemd() -> None:
    if "WITH_CAN" not in os.environ or not Path("/run/systemd/system").is_dir():
        pytest.skip("tests/integration/test_own_kernel.py runs this in a kernel of its own, under systemd")


@pytest.fixture(scope="session")
def program(_own_systemd: None) -> Path:
    """The command of an installation for the whole machine."""
    python = Path(sys.executable)
    if hidden([Path(sys.base_prefix)]) is not None:  # A home's Python, which the service could not run.
        mount_there(Path(sys.base_prefix), PYTHON)
        python = Path(PYTHON, "bin", f"python{sys.version_info.major}.{sys.version_info.minor}")
    subprocess.run([python, "-m", "venv", "--without-pip", PREFIX], check=True, timeout=120)
    packages = next(PREFIX.glob("lib/python3*/site-packages"))
    mount_there(Path(sysconfig.get_path("purelib")), packages)
    shutil.rmtree(packages / "ingestd", ignore_errors=True)  # what an installation in place leaves there
    shutil.copytree(ROOT / "ingestd", packages / "ingestd", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("migrations", "systemd"):
        shutil.copytree(ROOT / name, packages / "ingestd" / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "schema.sql", packages / "ingestd")
    script = PREFIX / "bin" / "ingestd"
    script.write_text(f"#!{PREFIX}/bin/python\nfrom ingestd.cli import main\nmain()\n")
    script.chmod(0o755)
    return script


def mount_there(folder: Path, there: Path) -> None:
    """Show a folder in a second place, until this kernel ends."""
    there.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "--bind", folder, there], check=True, timeout=60)


@pytest.fixture(scope="session")
def installed(program: Path, postgres_server: str) -> None:
    """The service is in place."""
    subprocess.run([program, "service", "install"], check=True, timeout=120)
    # The server of these tests listens in a folder that it has closed to others, as it must be when it starts.
    [folder] = parse_qs(urlsplit(postgres_server).query)["host"]
    Path(folder).chmod(0o711)
    drop_in("python", f"[Service]\nEnvironment=LD_LIBRARY_PATH={PYTHON}/lib\n")  # Moved, it would not find its own.


def drop_in(name: str, text: str) -> None:
    """As `systemctl edit` does; no text takes it away."""
    for unit in ("ingestd.service.d", "ingestd@.service.d"):
        path = Path("/etc/systemd/system", unit, f"{name}.conf")
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        if text:
            path.write_text(text)
    systemctl("daemon-reload")


@pytest.fixture
def bus() -> Iterator[Bus]:
    """A bus that is up."""
    with Bus() as made:
        yield made


@pytest.fixture
def line() -> Iterator[Instrument]:
    """A serial device that says numbers, where udev would put it, and with the group that it would give it."""
    INSTRUMENTS.mkdir(exist_ok=True)
    made = Instrument(INSTRUMENTS / "line", pause_s=0.01)
    shutil.chown(made.link, "root", "dialout")
    made.link.chmod(0o660)
    yield made
    made.close()


@pytest.fixture
def unit(installed: None, migrated: str, line: Instrument, bus: Bus) -> Iterator[Unit]:
    """The service, configured for a bus and a line and a database, not started, and without a past."""
    made = Unit(migrated, line, bus)
    yield made
    made.close()
    drop_in("watchdog", "")
