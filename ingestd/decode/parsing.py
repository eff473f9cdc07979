"""Parse a signal database in a process of its own: `python -m ingestd.decode.parsing FILE MATCH`.

It takes seconds on a small computer, and memory that is given back only when a process ends. The database, or the error
about it, is pickled to stdout for `parse`, which started it.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import cast

from ingestd.decode.databases import Match, SignalDatabase, load
from ingestd.errors import IngestdError, SignalDatabaseError


async def parse(path: Path, match: Match) -> SignalDatabase:
    """`load` in another process, which does not outlive a cancellation.

    Raises what `load` raises, and SignalDatabaseError if the process ended without a word.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "ingestd.decode.parsing", path, match,
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        said, complaint = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        last = complaint.decode(errors="replace").strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
        raise SignalDatabaseError(f"{path}: the process that parsed it ended: {last[0]}", "is there enough memory?")
    result = await asyncio.to_thread(pickle.loads, said)
    if isinstance(result, IngestdError):
        raise result
    return cast(SignalDatabase, result)


def _main(path: str, match: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits.
    with suppress(PermissionError):  # A sandbox may forbid even that.
        os.nice(10)
    result: SignalDatabase | IngestdError
    try:
        result = load(Path(path), cast(Match, match))
    except IngestdError as error:
        result = error
    sys.stdout.buffer.write(pickle.dumps(result, pickle.HIGHEST_PROTOCOL))


if __name__ == "__main__":
    _main(*sys.argv[1:3])
