"""A fuzz target: what is drawn, what must hold for it, and how both are run.

The same targets run derandomized and bounded under pytest, and for as long as one likes from the command line.
An example that takes more than CPU_SECONDS_MAX of computing hangs, however busy the machine is otherwise.
"""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any, Final

from hypothesis import HealthCheck, Phase, example, given, seed, settings
from hypothesis.strategies import SearchStrategy

from tests.property.fuzz.mutations import CORPORA, Corpus

CPU_SECONDS_MAX: Final = 30.0

Strategies = Mapping[str, SearchStrategy[Any]]


class HangsError(AssertionError):
    """The work for one example has no end, or none that anybody waits for."""


@dataclass
class Target:
    """`check` gets what `draw` of a corpus says, by name. `found` are examples that failed once: they come first."""

    name: str
    draw: Callable[[Corpus], Strategies]
    check: Callable[..., None]
    examples: int = 100  # under pytest, of each corpus
    corpora: tuple[Corpus, ...] = CORPORA
    found: list[dict[str, Any]] = field(default_factory=list)

    def __repr__(self) -> str:
        return self.name

    def run(self, corpus: Corpus) -> int:
        """The examples of a test run, always the same ones. Returns how many there were."""
        return self._run(corpus, settings(_BOUNDED, max_examples=self.examples), None)

    def run_randomly(self, corpus: Corpus, examples: int, number: int) -> int:
        """New examples, which `number` decides."""
        return self._run(corpus, settings(_ENDLESS, max_examples=examples), number)

    def _run(self, corpus: Corpus, how: settings, number: int | None) -> int:
        count = 0

        @wraps(self.check)
        def counted(**drawn: Any) -> None:
            nonlocal count
            count += 1
            with _in_time(), warnings.catch_warnings():
                warnings.simplefilter("error")
                self.check(**drawn)

        test = given(**self.draw(corpus))(counted)
        for one in self.found:
            test = example(**one)(test)
        if number is not None:
            test = seed(number)(test)
        how(test)()
        return count


_BOUNDED: Final = settings(
    derandomize=True, database=None, deadline=None, report_multiple_bugs=False, suppress_health_check=list(HealthCheck)
)
_ENDLESS: Final = settings(
    _BOUNDED, derandomize=False, phases=[Phase.explicit, Phase.generate, Phase.target, Phase.shrink]
)


@cache
def _scratch() -> TemporaryDirectory[str]:
    return TemporaryDirectory(prefix="ingestd-fuzz-")


def scratch() -> Path:
    """A folder for files of examples, which goes with the process."""
    return Path(_scratch().name)


@contextmanager
def _in_time() -> Iterator[None]:
    """Raises HangsError in what takes more than CPU_SECONDS_MAX of computing."""

    def hangs(_number: int, _frame: FrameType | None) -> None:
        raise HangsError(f"more than {CPU_SECONDS_MAX:g} s of computing")

    before = signal.signal(signal.SIGVTALRM, hangs)
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS_MAX)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
