"""`ingestd service`: make a systemd service of the daemon, take it away, and tell how it is."""

from __future__ import annotations

import grp
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import click

from ingestd.cli.console import Listing, json_option, out, warn
from ingestd.config import load_config
from ingestd.daemon.unit_files import (
    CONFIGURATION,
    DSN,
    ENVIRONMENT,
    EXAMPLE_FOLDERS,
    FOLDERS,
    PROGRAM,
    SERIAL_GROUP,
    SERIAL_GROUPS,
    UNITS,
    SystemFile,
    files,
    hidden,
    read,
)
from ingestd.errors import ConfigError, IngestdError, UsageError

THIS_PROGRAM = Path(sys.prefix, "bin", "ingestd")
IN_PLACE, MISSING, CHANGED = "in place", "missing", "changed, or of another release"
COMMAND_SECONDS_MAX = 120.0
RMEM_MAX = Path("/proc/sys/net/core/rmem_max")
SHOWN = ("ActiveState", "SubState", "UnitFileState", "StatusText", "MainPID", "NRestarts", "ActiveEnterTimestamp",
         "MemoryCurrent", "Result")  # fmt: skip

root_option = click.option(
    "--root", type=click.Path(path_type=Path), metavar="DIR",
    help="For packages and images: files below DIR, where packages keep theirs; nothing is started.",
)  # fmt: skip
program_option = click.option(
    "--program", type=click.Path(path_type=Path), metavar="PATH",
    help=f"What the service runs. Default: this installation; with --root {PROGRAM}.",
)  # fmt: skip


@click.group("service")
def service_group() -> None:
    """The daemon as a systemd service."""


@service_group.command("install")
@root_option
@program_option
def service_install(root: Path | None, program: Path | None) -> None:
    """Put units, user, udev rules and settings in place; enable the service, and start it if it is configured.

    Run again, it brings everything up to date and leaves the rest alone. Asks nothing.
    """
    if program is not None and not re.fullmatch(r"(/[\w.+-]+)+", str(program)):
        raise UsageError(f"a unit cannot name the program {str(program)!r}", "give an absolute path without blanks")
    if root is not None:
        _write(root, files(program or PROGRAM, for_package=True))
        _write_if_absent(root / CONFIGURATION, read("ingestd.toml"))
        return
    _must_be_root("install")
    program = program or THIS_PROGRAM
    _must_be_visible(program)
    _must_not_be_masked()
    changed = _write(Path("/"), files(program, for_package=False, serial_group=_serial_group()))
    _call("systemd-sysusers", "ingestd.conf")
    _call("systemd-tmpfiles", "--create", "ingestd.conf")
    configuration = Path("/", CONFIGURATION)
    if _write_if_absent(configuration, read("ingestd.toml")):
        shutil.chown(configuration, "root", "ingestd")
        configuration.chmod(0o640)
    _raise_receive_buffers()
    if shutil.which("udevadm") is not None:
        try:
            _call("udevadm", "control", "--reload")
            _call("udevadm", "trigger", "--subsystem-match=tty")
        except IngestdError as error:  # in a container
            warn(f"the names of serial devices come with the next boot: {error.args[0]}")
    _call("systemctl", "daemon-reload")
    _call("systemctl", "enable", "--quiet", "ingestd.service")
    if _show("ingestd.service")["ActiveState"] in ("active", "reloading", "activating"):
        if any(path.name in UNITS for path in changed):
            out.print("the service runs on as it was; `systemctl restart ingestd` when a gap of some seconds suits")
        return
    try:
        # What this shell has in its environment the service does not have.
        load_config(configuration, environment={})
    except ConfigError as error:
        if Path("/", ENVIRONMENT).exists():  # What that says only systemd knows.
            _call("systemctl", "start", "ingestd.service")
            return
        out.print(f"enabled, not started: {error.args[0]}")
        out.print(f"When that is in order (the DSN may be alone in {Path('/', DSN)}): systemctl start ingestd")
        return
    _call("systemctl", "start", "ingestd.service")
    out.print(f"started: {_show('ingestd.service')['StatusText']}")


@service_group.command("uninstall")
@root_option
def service_uninstall(root: Path | None) -> None:
    """Stop the service and take away what `install` has put in place; what was recorded and configured stays."""
    if root is None:
        _must_be_root("uninstall")
        wanted = {path.name for path in Path("/etc/systemd/system").glob("*.wants/ingestd*.service")}
        if enabled := sorted(wanted & {UNITS[0]} | {name for name in wanted if name.startswith("ingestd@")}):
            _call("systemctl", "disable", "--now", "--quiet", *enabled)
        if Path("/etc/systemd/system", UNITS[0]).exists():
            _call("systemctl", "stop", UNITS[0], "ingestd@*.service")
    for path, text in _placed(root):
        state = _state(path, text)
        if state == IN_PLACE:
            path.unlink()
            out.print(f"removed {path}")
        elif state != MISSING:
            out.print(f"removed {path}; as it was changed: {_put_aside(path)}")
    with suppress(OSError):  # Somebody has put something there, or nobody has made it.
        Path(root or "/", EXAMPLE_FOLDERS[root is not None]).rmdir()
    if root is None:
        _call("systemctl", "daemon-reload")
        states = " ".join(map(str, sorted(Path("/var/lib").glob("ingestd*")))) or "nothing in /var/lib"
        out.print(f"left: /etc/ingestd, the user ingestd, and what is recorded: {states}")
        out.print("whether the database has it all, `ingestd journal status FOLDER/journal` says")
    elif Path(root, CONFIGURATION).exists():
        out.print(f"left: {Path(root, CONFIGURATION)}")


@service_group.command("status")
@json_option
def service_status(as_json: bool) -> None:
    """Whether everything is in place, and how the service is. Exit code 1 if it does not run as installed."""
    _needs_systemd("install")
    states = {str(path): _state(path, text) for path, text in _placed(None)}
    shown = _show("ingestd.service")
    others = _instances()
    rmem_max, wanted = _rmem_max(), _wanted_receive_buffer()
    is_well = shown["ActiveState"] == "active" and all(state == IN_PLACE for state in states.values())
    if as_json:
        said = {"service": shown, "instances": others, "files": states, "rmem_max": rmem_max, "ok": is_well}
        out.print_json(json.dumps(said), indent=None)
    else:
        table = Listing("what", "how it is", header=False)
        table.add(
            "ingestd.service",
            f"{shown['ActiveState']} ({shown['SubState']}), {shown['UnitFileState'] or 'not installed'}",
        )
        if shown["ActiveState"] == "active":
            table.add(
                "since", f"{shown['ActiveEnterTimestamp']}, restarts {shown['NRestarts']}, process {shown['MainPID']}"
            )
            table.add("status", shown["StatusText"])
        for name, state in others.items():
            table.add(name, state)
        table.add("program", _program_of_unit(None) or THIS_PROGRAM)
        if rmem_max is not None:
            smaller = "" if rmem_max >= wanted else f": smaller than {wanted}, `ingestd service install` raises it"
            table.add("net.core.rmem_max", f"{rmem_max}{smaller}")
        for path, state in states.items():
            table.add(path, state)
        out.print(table)
    if not is_well:
        raise click.exceptions.Exit(1)


def _needs_systemd(what: str) -> None:
    if shutil.which("systemctl") is None or not Path("/run/systemd/system").is_dir():
        raise IngestdError("systemd does not run here", f"for an image or a package: ingestd service {what} --root DIR")


def _must_be_root(what: str) -> None:
    _needs_systemd(what)
    if os.geteuid() != 0:
        raise IngestdError("only root can change the services of this machine", f"sudo {THIS_PROGRAM} service {what}")


def _must_be_visible(program: Path) -> None:
    """Raises UsageError if the service, which is kept from homes, could not run the program."""
    if not program.exists():
        raise UsageError(f"there is no {program}", "name the program with --program")
    paths = [program.resolve()]
    if program == THIS_PROGRAM:
        paths += [Path(sys.base_prefix).resolve(), Path(__file__).resolve()]
    unseen = hidden(paths)
    if unseen is not None:
        raise UsageError(
            f"the service could not run {unseen}: it is kept from homes and temporary folders",
            f"install into {PROGRAM.parents[1]}, with a python3 of the system: docs/operations.md",
        )


def _must_not_be_masked() -> None:
    """Raises IngestdError: who masks a unit wants it never to run, and a link to nothing is there instead of it."""
    for name in UNITS:
        unit = Path("/etc/systemd/system", name)
        if unit.is_symlink() and unit.resolve() == Path("/dev/null"):
            raise IngestdError(f"{name} is masked on this machine", f"if it is to run: systemctl unmask {name}")


def _placed(root: Path | None) -> list[tuple[Path, str]]:
    """Where everything is that `install` puts in place, and what it is to be, for the program that the unit names."""
    program = _program_of_unit(root) or (THIS_PROGRAM if root is None else PROGRAM)
    serial_group = _serial_group() if root is None else SERIAL_GROUP
    placed = files(program, for_package=root is not None, serial_group=serial_group)
    return [(Path(root or "/", file.path), file.text) for file in placed]


def _program_of_unit(root: Path | None) -> Path | None:
    unit = Path(root or "/", FOLDERS[UNITS[0]][root is not None], UNITS[0])
    with suppress(OSError):
        for line in unit.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("ExecStart=/"):
                return Path(line.removeprefix("ExecStart=").partition(" ")[0])
    return None


def _serial_group() -> str:
    """The group of serial lines on this machine."""
    there = {group.gr_name for group in grp.getgrall()}
    return next((name for name in SERIAL_GROUPS if name in there), SERIAL_GROUP)


def _state(path: Path, text: str) -> str:
    if not os.path.lexists(path):
        return MISSING
    with suppress(OSError):  # a folder, a link that ends nowhere
        if path.is_file() and not path.is_symlink() and path.read_bytes() == text.encode():
            return IN_PLACE
    return CHANGED


def _write(root: Path, wanted: Sequence[SystemFile]) -> list[Path]:
    """The files that were not as they should be, and are now; what was there before stays beside them."""
    changed = []
    for file in wanted:
        path = root / file.path
        state = _state(path, file.text)
        if state == IN_PLACE:
            continue
        aside = _put_aside(path) if state == CHANGED else None
        _put_in_place(path, file.text)
        out.print(f"wrote {path}" + (f"; as it was: {aside} (changes belong in a drop-in)" if aside else ""))
        changed.append(path)
    if not changed:
        out.print("all files are in place")
    return changed


def _put_in_place(path: Path, text: str) -> None:
    """All of it or nothing, whatever the umask. Raises IngestdError."""
    try:
        for folder in reversed([each for each in path.parents if not each.exists()]):
            folder.mkdir()
            folder.chmod(0o755)
        new = path.with_name(f".{path.name}.{os.getpid()}")
        with new.open("xb") as file:
            file.write(text.encode())
        new.chmod(0o644)
        new.replace(path)
    except OSError as error:
        raise IngestdError(f"cannot write {path}: {error.strerror}", "who may write there?") from error


def _put_aside(path: Path) -> str:
    """Rename to a name beside it that nothing has yet, and that nobody reads; that name."""
    names = (path.with_name(f"{path.name}.before{number or ''}") for number in itertools.count())
    aside = next(name for name in names if not os.path.lexists(name))
    path.replace(aside)
    return aside.name


def _write_if_absent(path: Path, text: str) -> bool:
    if os.path.lexists(path):
        return False
    _put_in_place(path, text)
    out.print(f"wrote {path}: say there what is to be recorded")
    return True


def _wanted_receive_buffer() -> int:
    line = next(line for line in read("sysctl.d/60-ingestd.conf").splitlines() if line.startswith("net.core.rmem_max"))
    return int(line.partition("=")[2])


def _raise_receive_buffers() -> None:
    """Now, and not at the next boot. Never lowered: somebody may have given it more."""
    wanted, found = _wanted_receive_buffer(), _rmem_max()
    if found is None or found >= wanted:
        return
    try:
        RMEM_MAX.write_text(str(wanted))
    except OSError as error:
        warn(f"net.core.rmem_max stays {found}, smaller than {wanted}: {error.strerror} (in a container: its host's)")


def _rmem_max() -> int | None:
    """What the kernel allows; None in a container that is not to know."""
    return int(RMEM_MAX.read_text()) if RMEM_MAX.exists() else None


def _call(*command: str) -> str:
    """Run a program of the system; what it said. Raises IngestdError."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS_MAX, check=False)
    except FileNotFoundError as error:
        raise IngestdError(f"{command[0]} is not there", "it belongs to systemd") from error
    except subprocess.TimeoutExpired as error:
        raise IngestdError(f"`{' '.join(command)}` did not end", "systemctl status ingestd") from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        hint = "journalctl -eu ingestd may say more" if command[:2] == ("systemctl", "start") else ""
        raise IngestdError(f"`{' '.join(command)}` failed: {said[0]}", hint)
    return done.stdout


def _show(unit: str) -> dict[str, str]:
    said = _call("systemctl", "show", unit, "--property", ",".join(SHOWN)).splitlines()
    return dict.fromkeys(SHOWN, "") | {name: value for name, _, value in (line.partition("=") for line in said)}


def _instances() -> dict[str, str]:
    """Units of the template that are loaded, and how they are."""
    lines = _call("systemctl", "list-units", "--all", "--plain", "--no-legend", "ingestd@*.service").splitlines()
    return {line.split()[0]: " ".join(line.split()[2:4]) for line in lines if line.strip()}
