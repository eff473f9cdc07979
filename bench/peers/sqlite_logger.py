"""python-can's own logger into SQLite: frames are captured, nothing is decoded.

    python bench/peers/sqlite_logger.py FILE CAPTURE

The messages are read beforehand: what is timed is the logger, from the first message to the last commit. It is waited
for: told to stop, python-can's writer (4.6.1) commits the batch that it is at, and loses what is queued behind it.
"""

from __future__ import annotations

import sys
import time

import can
from plain_table import say


def main(path: str, capture: str) -> None:
    with can.LogReader(capture) as reader:
        messages = list(reader)
    started = time.perf_counter()
    with can.SqliteWriter(path) as writer:
        for message in messages:
            writer(message)
        while writer.num_frames < len(messages):
            time.sleep(0.001)
        seconds = time.perf_counter() - started
    say(len(messages), seconds)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
