"""The files that make a service of the daemon: what they are, and where they belong. Nothing is written here.

They are in `systemd/`, as they are to be read, and travel inside the package. Two things in them are this machine's:
the program's place, and the group that serial lines belong to.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

PROGRAM = Path("/opt/ingestd/bin/ingestd")
SERIAL_GROUP = "dialout"
SERIAL_GROUPS = (SERIAL_GROUP, "uucp")  # of Debian, Fedora, openSUSE; of Arch and Gentoo
UNITS = ("ingestd.service", "ingestd@.service")
CONFIGURATION = Path("etc/ingestd/ingestd.toml")
DSN = Path("etc/ingestd/ingestd.dsn")
ENVIRONMENT = Path("etc/ingestd/environment")

# From the folder of ours to that of the system: an administrator's, and a package's, before which the former goes.
FOLDERS = {
    "ingestd.service": ("etc/systemd/system", "usr/lib/systemd/system"),
    "ingestd@.service": ("etc/systemd/system", "usr/lib/systemd/system"),
    "sysusers.d/ingestd.conf": ("etc/sysusers.d", "usr/lib/sysusers.d"),
    "tmpfiles.d/ingestd.conf": ("etc/tmpfiles.d", "usr/lib/tmpfiles.d"),
    "sysctl.d/60-ingestd.conf": ("etc/sysctl.d", "usr/lib/sysctl.d"),
    "udev/70-ingestd.rules": ("etc/udev/rules.d", "usr/lib/udev/rules.d"),
}
EXAMPLES = ("network/10-can0.link", "network/80-can0.network", "network/80-can1-fd.network")
EXAMPLE_FOLDERS = ("usr/local/share/doc/ingestd", "usr/share/doc/ingestd")

# What the unit hides from the service (ProtectHome=, PrivateTmp=).
HIDDEN = (Path("/home"), Path("/root"), Path("/run/user"), Path("/tmp"), Path("/var/tmp"))


@dataclass(frozen=True, slots=True)
class SystemFile:
    """A file below the root of a system."""

    path: Path  # relative
    text: str


def files(program: Path, *, for_package: bool, serial_group: str = SERIAL_GROUP) -> list[SystemFile]:
    """All that is put in place, but for the configuration, which is the operator's."""
    placed = []
    for name, folders in {**FOLDERS, **dict.fromkeys(EXAMPLES, EXAMPLE_FOLDERS)}.items():
        text = read(name).replace(str(PROGRAM), str(program))
        if serial_group != SERIAL_GROUP:
            text = text.replace(f"={SERIAL_GROUP}\n", f"={serial_group}\n").replace(
                f" {SERIAL_GROUP}", f" {serial_group}"
            )
        placed.append(SystemFile(Path(folders[for_package], Path(name).name), text))
    return placed


def read(name: str) -> str:
    """One of the files in `systemd/`."""
    package = Path(__file__).resolve().parents[1]
    folder = next(each for each in (package / "systemd", package.parent / "systemd") if each.is_dir())
    return (folder / name).read_text(encoding="utf-8")


def hidden(paths: Iterable[Path]) -> Path | None:
    """The first of the paths that the service could not see."""
    return next((path for path in paths if any(path.is_relative_to(folder) for folder in HIDDEN)), None)
