"""What happens to the database, the network and the disk while a daemon is on its way to its death.

Each blow strikes and is mended; in between lies a random time. Most leave the daemon to find out by itself.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ingestd.store import embedded
from tests.torture.proxy import Proxy
from tests.torture.server import TEMPLATE, Server, resume, suspend

DISK_BYTES = 256 << 20


@dataclass
class Scene:
    """Who is there to be struck."""

    server: Server
    proxy: Proxy
    name: str  # of the database
    random: random.Random
    pid: int = 0  # of the daemon
    disk: Path | None = None  # a small file system under the journal
    has_backup: bool = False


Blow = Callable[[Scene], None]


def cut(scene: Scene) -> None:
    scene.proxy.cut()


def cut_after_some_bytes(scene: Scene) -> None:
    scene.proxy.cut_after(int(2 ** scene.random.uniform(0, 17)))


def lose_the_answer_to_commit(scene: Scene) -> None:
    scene.proxy.lose_answer()


def stall(scene: Scene) -> None:
    scene.proxy.stall()


def half_close(scene: Scene) -> None:
    scene.proxy.half_close(to_server=scene.random.random() < 0.5)


def refuse_connections(scene: Scene) -> None:
    scene.proxy.refuse()


def end_sessions(scene: Scene) -> None:
    scene.server.end_sessions(scene.name)


def kill_postgres(scene: Scene) -> None:
    scene.server.kill()


def stop_postgres(scene: Scene) -> None:
    scene.server.stop()


def read_only(scene: Scene) -> None:
    scene.server.set(scene.name, "SET default_transaction_read_only = on")


def time_out_statements(scene: Scene) -> None:
    scene.server.set(scene.name, "SET statement_timeout = '3ms'")


def lose_the_database(scene: Scene) -> None:
    scene.server.restore(scene.name, TEMPLATE)


def back_up_and_restore_later(scene: Scene) -> None:
    """The first time the backup is made, the next time it comes back."""
    if scene.has_backup:
        scene.server.restore(scene.name, f"{scene.name}_backup")
    else:
        scene.server.back_up(scene.name)
    scene.has_backup = not scene.has_backup


def suspend_the_daemon(scene: Scene) -> None:
    suspend(scene.pid)


def fill_the_disk(scene: Scene) -> None:
    assert scene.disk is not None
    with contextlib.suppress(OSError), (scene.disk / "hog").open("wb", buffering=0) as hog:
        while True:
            hog.write(bytes(1 << 20))


def mend(scene: Scene) -> None:
    """Everything is as it should be."""
    resume(scene.pid)
    scene.server.start()
    scene.server.set(scene.name, "RESET ALL")
    scene.proxy.mend()
    if scene.disk is not None:
        (scene.disk / "hog").unlink(missing_ok=True)


@contextmanager
def locked(scene: Scene, seconds: float) -> Iterator[None]:
    """Somebody else holds a lock on what the daemon writes to, for so long at the most."""
    arguments = [str(embedded.psql_path()), "-XqAt", "-d", scene.server.dsn(scene.name)]
    statements = f"BEGIN; LOCK TABLE feeds; SELECT pg_sleep({seconds}); COMMIT"
    with subprocess.Popen(
        [*arguments, "-c", statements], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as holder:
        yield
        holder.wait(60)


def lock_the_feeds(scene: Scene) -> None:
    seconds = scene.random.uniform(0.1, 1.0)

    def hold() -> None:
        with locked(scene, seconds):
            pass

    threading.Thread(target=hold, daemon=True).start()


BLOWS: tuple[Blow, ...] = (
    cut, cut_after_some_bytes, cut_after_some_bytes, lose_the_answer_to_commit, stall, half_close, refuse_connections,
    end_sessions, kill_postgres, stop_postgres, read_only, time_out_statements, suspend_the_daemon, lock_the_feeds,
)  # fmt: skip


def blows_of(scene: Scene) -> tuple[Blow, ...]:
    """What may happen there. A full disk has the journal give up what the database has: then that is not lost, too."""
    return (*BLOWS, fill_the_disk) if scene.disk else (*BLOWS, lose_the_database, back_up_and_restore_later)


@contextmanager
def small_disk(parent: Path) -> Iterator[Path | None]:
    """A file system that can be filled without harm, where we may mount one."""
    folder = parent / "disk"
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs"]
    mount = shutil.which("mount")
    is_mounted = (
        os.geteuid() == 0
        and mount is not None
        and subprocess.run([mount, *options, folder], check=False, stderr=subprocess.DEVNULL).returncode == 0
    )
    try:
        yield folder if is_mounted else None
    finally:
        if is_mounted:
            subprocess.run(["umount", "-l", folder], check=True)  # What is in it is gone with it.
