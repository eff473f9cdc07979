"""The files in systemd/ and the command that puts them in place, as far as no running systemd is needed.

With one, in a kernel of its own: tests/service.
"""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from ingestd.config import load_config
from ingestd.daemon.unit_files import EXAMPLES, UNITS, files, hidden, read
from tests.commands import run_ingestd

EXPOSURE_MAX = 2.0
NEEDS_SYSTEMD = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here to ask")


@pytest.fixture
def units(tmp_path: Path) -> list[Path]:
    """The units, with a program that is there."""
    program = tmp_path / "bin" / "ingestd"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    paths = []
    for file in files(program, for_package=False):
        if file.path.name in UNITS:
            paths.append(tmp_path / file.path.name)
            paths[-1].write_text(file.text)
            assert f"ExecStart={program} run -c " in file.text
    return paths


@NEEDS_SYSTEMD
def test_systemd_understands_every_line(units: list[Path]) -> None:
    """systemd-analyze has nothing to say about the units; it has about one that is broken."""
    for unit in units:
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, timeout=60
        )
        said = [line for line in (done.stdout + done.stderr).splitlines() if "ingestd" in line]
        assert (said, done.returncode) == ([], 0)
    broken = units[0].with_name("ingestd-broken.service")
    broken.write_text(units[0].read_text().replace("WatchdogSec=60", "WatchdogSecs=60"))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", broken], capture_output=True, text=True, timeout=60)
    assert "WatchdogSecs" in done.stderr, "systemd-analyze says nothing about anything"


@NEEDS_SYSTEMD
def test_what_the_service_may_do_is_little(units: list[Path]) -> None:
    """The exposure that systemd computes is at most 2.0 of 10."""
    for unit in units:
        command = [
            "systemd-analyze",
            "security",
            "--offline=true",
            f"--threshold={EXPOSURE_MAX * 10:.0f}",
            "--no-pager",
        ]
        done = subprocess.run([*command, unit], capture_output=True, text=True, timeout=60)
        found = re.search(r"exposure level for \S+: (\S+)", done.stdout)
        assert found is not None, done.stderr
        assert float(found[1]) <= EXPOSURE_MAX, done.stdout
        assert done.returncode == 0, done.stdout


def test_the_template_is_the_service_but_for_its_paths() -> None:
    """What holds for one holds for several."""
    service, template = (
        [line for line in read(name).splitlines() if line and not line.startswith("#")] for name in UNITS
    )
    different = [(one, other) for one, other in zip(service, template, strict=True) if one != other]
    assert [other.replace("%i", "ingestd").replace("ingestd-ingestd", "ingestd") for _, other in different] == [
        one.replace("ingestd: telemetry", "ingestd ingestd: telemetry")
        .replace("/ingestd/environment", "/ingestd/ingestd.environment")
        for one, _ in different
    ]  # fmt: skip
    assert len(different) == 8


def test_everything_has_its_place_in_a_package(tmp_path: Path) -> None:
    """`--root` writes where packages keep things, is idempotent, keeps what was changed, and takes its files away."""
    command = ("service", "install", "--root", str(tmp_path), "--program", "/usr/bin/ingestd")
    assert run_ingestd(*command).stdout.count("wrote") == 10
    unit = tmp_path / "usr/lib/systemd/system/ingestd.service"
    assert "ExecStart=/usr/bin/ingestd run -c /etc/ingestd/ingestd.toml\n" in unit.read_text()
    assert "/opt/" not in unit.read_text()
    configuration = tmp_path / "etc/ingestd/ingestd.toml"
    configuration.write_text("# mine\n")
    unit.write_text("# changed\n")
    again = run_ingestd(*command)
    assert again.stdout.startswith(f"wrote {unit}; as it was: ingestd.service.before (")
    assert again.stdout.count("wrote") == 1
    assert unit.with_name("ingestd.service.before").read_text() == "# changed\n"
    assert run_ingestd(*command).stdout == "all files are in place\n"
    rules = tmp_path / "usr/lib/udev/rules.d/70-ingestd.rules"
    rules.write_bytes(b"# m\xedo\n")
    said = run_ingestd("service", "uninstall", "--root", str(tmp_path)).stdout
    assert said.endswith(f"left: {configuration}\n")
    left = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(map(str, left)) == [
        "etc/ingestd/ingestd.toml",
        "usr/lib/systemd/system/ingestd.service.before",
        "usr/lib/udev/rules.d/70-ingestd.rules.before",
    ]
    assert rules.with_name(f"{rules.name}.before").read_bytes() == b"# m\xedo\n"
    assert configuration.read_text() == "# mine\n"
    assert not (tmp_path / "usr/share/doc/ingestd").exists()


def test_files_are_for_all_to_read_and_lead_nowhere_else(tmp_path: Path) -> None:
    """Whatever the umask; and a link in the tree does not lead out of it."""
    elsewhere, root = tmp_path / "elsewhere", tmp_path / "root"
    elsewhere.write_text("mine")
    configuration, unit = root / "etc/ingestd/ingestd.toml", root / "usr/lib/systemd/system/ingestd.service"
    for link in (configuration, unit):
        link.parent.mkdir(parents=True)
        link.symlink_to(elsewhere)
    before = os.umask(0o077)
    try:
        run_ingestd("service", "install", "--root", str(root))
    finally:
        os.umask(before)
    assert elsewhere.read_text() == "mine"
    assert configuration.is_symlink()
    assert unit.stat().st_mode & 0o777 == 0o644
    made = {path.stat().st_mode & 0o777 for path in (root / "usr/lib/udev").rglob("*")}
    assert made == {0o755, 0o644}


@pytest.mark.parametrize("program", ["bin/ingestd", "/opt/my programs/ingestd", "/opt/100%/ingestd"])
def test_a_program_that_no_unit_can_name(tmp_path: Path, program: str) -> None:
    """Before anything is written."""
    done = run_ingestd("service", "install", "--root", str(tmp_path), "--program", program, exit_code=2)
    assert "absolute path without blanks" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_first_configuration_lacks_only_a_database(tmp_path: Path) -> None:
    """What `install` writes is right, once somebody has said where the data go."""
    path = tmp_path / "ingestd.toml"
    path.write_text(read("ingestd.toml"))
    done = run_ingestd("check", "-c", path, exit_code=2)
    assert "there is no database" in done.stderr
    config = load_config(path, dsn="postgresql://somewhere/db")
    assert [bus.name for bus in config.can] == ["can0"]
    commented = read("ingestd.toml").replace("# [[", "[[").replace('# name = "gps"', 'name = "gps"')
    commented = re.sub(r"^# (port|protocol|baudrate|car_id)", r"\1", commented, flags=re.MULTILINE)
    path.write_text(commented)
    assert [line.name for line in load_config(path, dsn="postgresql://somewhere/db").serial] == ["gps"]


def test_where_serial_lines_belong_to_another_group() -> None:
    """Arch calls it uucp; then so do the unit and the user."""
    texts = {str(file.path): file.text for file in files(Path("/bin/x"), for_package=False, serial_group="uucp")}
    assert "SupplementaryGroups=uucp\n" in texts["etc/systemd/system/ingestd.service"]
    assert "m ingestd uucp\n" in texts["etc/sysusers.d/ingestd.conf"]


def test_a_program_that_the_service_could_not_see() -> None:
    """Homes and temporary folders are hidden from it; the first such path is named."""
    home = Path("/home") / "somebody" / "x"
    assert hidden([Path("/opt/x"), home, Path("/tmp/x")]) == home
    assert hidden([Path("/opt/x"), Path("/usr/bin/python3"), Path("/homes/x")]) is None


def test_without_systemd_there_is_nothing_to_install_into() -> None:
    """The command says so, and what it can do instead."""
    if Path("/run/systemd/system").is_dir():
        pytest.skip("systemd runs here; tests/service tries the rest in a machine of its own")
    for what in ("install", "uninstall", "status"):
        done = run_ingestd("service", what, exit_code=1)
        assert "systemd does not run here" in done.stderr


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_for_the_network_are_files_of_networkd(name: str) -> None:
    """They have its sections, and each key once. The emulated machine brings a bus up with them: tests/machine."""
    parser = configparser.ConfigParser(strict=True)
    parser.optionxform = str  # type: ignore[method-assign, assignment]
    parser.read_string(read(name))
    assert set(parser.sections()) <= {"Match", "CAN", "Link"}
    if name.endswith(".network"):
        assert {"BitRate", "SamplePoint", "RestartSec"} <= set(parser["CAN"])


def test_the_receive_buffers_are_those_of_the_configuration(tmp_path: Path) -> None:
    """What sysctl allows is what a bus asks for by default."""
    path = tmp_path / "ingestd.toml"
    path.write_text('[[can]]\nname = "can0"\n')
    [bus] = load_config(path, dsn="postgresql://somewhere/db").can
    assert f"net.core.rmem_max = {bus.receive_buffer_bytes}\n" in read("sysctl.d/60-ingestd.conf")
