"""Who holds a journal: one process at a time, by a lock that the kernel gives back however it ends."""

from __future__ import annotations

import fcntl
import os
import time
from datetime import UTC, datetime
from pathlib import Path

from ingestd.errors import IngestdError

LOCK_NAME = "lock"
ATTEMPTS = 4  # Somebody who only asks who holds it has the lock for an instant, too.
ATTEMPT_SECONDS = 0.05


def take_lock(folder: Path) -> int:
    """Take the journal, and note who we are. Raises IngestdError naming the process that has it, OSError."""
    descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    attempts_left = ATTEMPTS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            attempts_left -= 1
            if attempts_left:
                time.sleep(ATTEMPT_SECONDS)
                continue
            holder = os.pread(descriptor, 200, 0).decode("utf-8", "replace").strip() or "another process"
            os.close(descriptor)
            raise IngestdError(
                f"the journal {folder} is held by {holder}", "one ingestd records into a journal; stop the other"
            ) from None
        except OSError:
            os.close(descriptor)
            raise
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"pid {os.getpid()} since {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC\n".encode(), 0)
    except OSError:
        pass  # A full disk: the lock holds all the same.
    return descriptor


def holder_of(folder: Path) -> str | None:
    """The process that holds the journal, in words, or None if nobody does."""
    try:
        descriptor = os.open(folder / LOCK_NAME, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.pread(descriptor, 200, 0).decode("utf-8", "replace").strip() or "another process"
    finally:
        os.close(descriptor)
    return None
