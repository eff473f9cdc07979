"""Each step of the path alone, beside the library a user would call for it, in one run and without a database.

    python bench/decode.py [--capture FILE --dbc FILE…] [--frames N]

Without --capture it is the demo car's drive. The best of three runs counts: the machine disturbed it least.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import can
import cantools

from ingestd import demo
from ingestd.chunks import Placement, encode_frames, encode_signals
from ingestd.decode.databases import load
from ingestd.imports import feed_items
from ingestd.model import ClockState
from ingestd.pipeline import Binding, Decoders
from ingestd.sources.captures import open_capture

LIBRARY_FRAMES = 30_000  # The libraries go frame by frame; their cost does not depend on how many.


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """The fastest of three runs, and what the last one returned."""
    best, result = float("inf"), None
    for _ in range(3):
        started = time.perf_counter()
        result = work()
        best = min(best, time.perf_counter() - started)
    return best, result


def with_python_can(capture: Path) -> list[can.Message]:
    messages = []
    with can.LogReader(capture) as reader:
        for message in reader:
            messages.append(message)
            if len(messages) == LIBRARY_FRAMES:
                break
    return messages


def with_cantools(messages: list[can.Message], databases: dict[str | None, Any]) -> int:
    count = 0
    for message in messages:
        database = databases.get(str(message.channel)) or databases.get(None)
        try:
            definition = database.get_message_by_frame_id(message.arbitration_id)
        except KeyError:
            continue
        count += len(definition.decode(bytes(message.data), decode_choices=False, allow_truncated=True))
    return count


def measure(capture: Path, sources: list[tuple[str | None, Path]]) -> None:
    bindings = [Binding(source, load(path)) for source, path in sources]
    placement = Placement(UUID(int=1), 0, ClockState.SET)
    parse, items = seconds(lambda: list(feed_items(open_capture(capture))))
    batches = [batch for item in items for batch in item.frames]
    decoders = Decoders(bindings)
    decode, decoded = seconds(lambda: [decoders.of(batch.source).decode(batch, {}) for batch in batches])
    encode, _ = seconds(lambda: [encode_signals(each.batches, placement) for each in decoded])
    raw, _ = seconds(lambda: [encode_frames([batch], placement) for batch in batches])
    frames = sum(map(len, batches))
    signals = sum(each.counts.signals for each in decoded)
    print(f"{capture.name}: {frames:,} frames, {signals:,} signals, {signals / frames:.1f} signals a frame")

    read, messages = seconds(lambda: with_python_can(capture))
    databases = {source: cantools.database.load_file(path, strict=False) for source, path in sources}
    by_library, library_signals = seconds(lambda: with_cantools(messages, databases))
    print(f"{'':24}{'ours':>14}{'library':>14}{'ratio':>8}")
    ours, theirs = 1e9 * parse / frames, 1e9 * read / len(messages)
    print(f"{'parse, ns/frame':24}{ours:14.0f}{theirs:14.0f}{theirs / ours:7.0f}x  python-can")
    ours, theirs = 1e9 * decode / signals, 1e9 * by_library / library_signals
    print(f"{'decode, ns/signal':24}{ours:14.1f}{theirs:14.1f}{theirs / ours:7.0f}x  cantools")
    print(f"{'encode, ns/signal':24}{1e9 * encode / signals:14.1f}")
    print(f"{'encode raw, ns/frame':24}{1e9 * raw / frames:14.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--capture", type=Path, help="another capture, with --dbc")
    parser.add_argument("--dbc", type=Path, action="append", default=[])
    arguments = parser.parse_args()
    if arguments.capture is not None:
        measure(arguments.capture, [(None, path) for path in arguments.dbc])
        return
    with tempfile.TemporaryDirectory(prefix="ingestd-bench-") as folder:
        capture = Path(folder) / "demo.log"
        demo.write_capture(capture, 600)
        measure(capture, [*demo.databases().items()])


if __name__ == "__main__":
    main()
