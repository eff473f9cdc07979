"""The sources of a running daemon, each in a task of its own: begun, ended, and watched for an end by themselves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

from ingestd.clock import mono_ns
from ingestd.model import Recorder, Source

log = logging.getLogger(__name__)


class Attendance:
    """Sources by name. `on_failure` is called with the task of one that ended by itself: sources never do."""

    def __init__(
        self, sources: Iterable[Source], recorder: Recorder, on_failure: Callable[[asyncio.Task[None]], None]
    ) -> None:
        self.sources = {source.name: source for source in sources}
        self._recorder = recorder
        self._on_failure = on_failure
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self.began_ns: dict[str, int] = {}  # when each began
        self._ending: set[asyncio.Task[None]] = set()
        self._closed = False

    def begin_all(self) -> None:
        """Begin every source that there is."""
        for source in self.sources.values():
            self.begin(source)

    def begin(self, source: Source) -> None:
        """Begin a source; none of its name may be running. After `end_all` nothing begins."""
        if self._closed:
            return
        self.sources[source.name] = source
        self.began_ns[source.name] = mono_ns()
        task = asyncio.create_task(source.run(self._recorder), name=source.name)
        self._tasks[source.name] = task
        task.add_done_callback(self._ended)

    async def end(self, names: Iterable[str]) -> None:
        """End sources: what the kernel still holds for them is recorded by then, and their devices are closed."""
        tasks = [self._tasks.pop(name) for name in names if name in self._tasks]
        for task in tasks:
            task.cancel()
        self._ending.update(tasks)
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Exception):
                log.error("a source did not end as it should", exc_info=result)
        self._ending.difference_update(tasks)

    async def end_all(self) -> None:
        """End every source, for good."""
        self._closed = True
        await self.end(list(self._tasks))
        await asyncio.gather(
            *self._ending, return_exceptions=True
        )  # which a reload has told to end, and waits for, too

    def _ended(self, task: asyncio.Task[None]) -> None:
        if self._tasks.get(task.get_name()) is task:
            self._on_failure(task)
