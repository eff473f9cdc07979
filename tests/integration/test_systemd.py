"""The unit in systemd/: systemd takes it as it is."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

UNIT = Path(__file__).parents[2] / "systemd" / "ingestd.service"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here to ask")
def test_systemd_understands_every_line(tmp_path: Path) -> None:
    """systemd-analyze has nothing to say about the unit, once the program is where the unit expects it."""
    program = tmp_path / "bin" / "ingestd"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    text = UNIT.read_text(encoding="utf-8")
    assert "ExecStart=/opt/ingestd/bin/ingestd run -c " in text
    unit = tmp_path / "ingestd.service"
    unit.write_text(text.replace("/opt/ingestd/bin/ingestd", str(program)), encoding="utf-8")
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, timeout=60)
    said = [line for line in (done.stdout + done.stderr).splitlines() if "ingestd" in line]
    assert (said, done.returncode) == ([], 0)
    broken = unit.with_name("ingestd-broken.service")
    broken.write_text(unit.read_text().replace("WatchdogSec=30", "WatchdogSecs=30"), encoding="utf-8")
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", broken], capture_output=True, text=True, timeout=60)
    assert "WatchdogSecs" in done.stderr, "systemd-analyze says nothing about anything"
