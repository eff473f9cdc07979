"""A PostgreSQL of the distribution for a benchmark: default settings, a Unix socket, gone afterwards.

The embedded server has no lz4 and would show other figures than the server people run; it is the fallback.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def server_binaries() -> Path | None:
    """The folder of the newest PostgreSQL that the distribution has installed, or None."""
    found = Path("/usr/lib/postgresql").glob("*/bin/initdb")
    newest = max(found, key=lambda path: float(path.parts[-3]), default=None)
    return None if newest is None else newest.parent


@contextmanager
def temporary_server(binaries: Path) -> Iterator[str]:
    """Start a fresh server with its default settings; yields the DSN of its database `postgres`."""
    as_user: list[str] = []
    folder = Path(tempfile.mkdtemp(prefix="ingestd-bench-"))
    folder.chmod(0o755)
    data = folder / "data"
    data.mkdir()
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root.
        as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
        shutil.chown(data, "postgres", "postgres")
    control = [*as_user, str(binaries / "pg_ctl"), "-D", str(data), "-w"]
    try:
        initdb = [*as_user, str(binaries / "initdb"), "-D", str(data), "-U", "postgres", "-A", "trust", "-E", "UTF8"]
        subprocess.run([*initdb, "--locale=C.UTF-8"], check=True, stdout=subprocess.DEVNULL, cwd="/")
        options = f"-c listen_addresses='' -c unix_socket_directories='{data}'"
        start = [*control, "-l", str(data / "log"), "-o", options, "start"]
        subprocess.run(start, check=True, stdout=subprocess.DEVNULL, cwd="/")
        try:
            data.chmod(0o711)
            yield f"postgresql://postgres@/postgres?host={data}"
        finally:
            subprocess.run([*control, "-m", "fast", "stop"], check=True, stdout=subprocess.DEVNULL, cwd="/")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
