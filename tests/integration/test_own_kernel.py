"""What needs a kernel of its own, in a user-mode one: CAN buses, disks that fail, systemd."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.can_bus.bus import has_vcan

ROOT = Path(__file__).parents[2]
WITH_CAN = ROOT / "tests" / "with_can"
SECONDS_MAX = 900


def without_harness(reason: str) -> None:
    if has_vcan():
        pytest.skip("tests/can_bus runs directly here; the rest needs a machine of its own")
    if os.environ.get("CI"):
        pytest.fail(f"with_can: {reason}")
    pytest.skip(reason)


@pytest.mark.slow
@pytest.mark.timeout(SECONDS_MAX + 60)
@pytest.mark.parametrize(
    ("folder", "options"), [("tests/can_bus", []), ("tests/disk", []), ("tests/service", ["--systemd"])]
)
def test_in_a_kernel_of_its_own(folder: str, options: list[str]) -> None:
    """Every test below the folder passes there, and none is skipped."""
    check = subprocess.run([WITH_CAN, "--check", *options], capture_output=True, text=True, timeout=SECONDS_MAX)
    if check.returncode:
        without_harness(check.stderr.strip() or check.stdout.strip())
    command = [WITH_CAN, *options, "--seconds", str(SECONDS_MAX), "--"]
    command += [sys.executable, "-m", "pytest", "-sv", "--color=no", "-p", "no:cacheprovider", "--durations=8", folder]
    run = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=SECONDS_MAX + 20
    )
    sys.stdout.write(run.stdout)
    assert run.returncode == 0, "see what the guest says above"
    assert " passed" in run.stdout
    assert " skipped" not in run.stdout
