"""The long fuzz run, from the command line.

    python -m tests.property.fuzz [--seconds 600] [--seed N] [--target NAME]

Runs each target in turn until the time is over and says how many examples each had. Ends with 1 at a failure, after
showing the smallest example that fails.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import traceback
from collections import Counter

from tests.property.fuzz import TARGETS
from tests.property.fuzz.mutations import DATA, MADE_HERE

ROUND_SECONDS = 4.0
FIRST_EXAMPLES = 25


def say(text: str) -> None:
    """At once, also into a pipe."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.property.fuzz", description="The long fuzz run.")
    parser.add_argument("--seconds", type=float, default=600.0, help="how long")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32), help="the same dice again")
    parser.add_argument("--target", action="append", help="only this one; may be given several times")
    given = parser.parse_args()
    turns = [
        (target, corpus)
        for target in TARGETS
        if not given.target or target.name in given.target
        for corpus in target.corpora
        if corpus is MADE_HERE or DATA.is_dir()
    ]
    if not turns:
        say(f"known targets: {', '.join(target.name for target in TARGETS)}")
        return 2
    say(f"seed {given.seed}; {len(turns)} turns a round" + ("" if DATA.is_dir() else f"; no captures in {DATA}"))
    began, number = time.monotonic(), 0
    examples: Counter[str] = Counter()
    seconds: Counter[str] = Counter()
    while time.monotonic() - began < given.seconds:
        target, corpus = turns[number % len(turns)]
        name = f"{target}/{corpus}"
        left = min(ROUND_SECONDS, given.seconds - (time.monotonic() - began))
        count = int(left * examples[name] / seconds[name]) + 1 if seconds[name] else FIRST_EXAMPLES
        turn_began = time.monotonic()
        try:
            examples[name] += target.run_randomly(corpus, count, given.seed + number)
        except BaseException as error:  # Hypothesis adds the smallest example as a note.
            traceback.print_exception(error)
            say(f"FAILED: {name}, seed {given.seed}, turn {number}")
            return 1
        seconds[name] += time.monotonic() - turn_began  # type: ignore[assignment]
        number += 1
    for name, count in sorted(examples.items()):
        say(f"{name:32} {count:8,} examples, {count / seconds[name]:7.1f} a second")
    say(f"seed {given.seed}, {sum(examples.values()):,} examples in {time.monotonic() - began:.0f} s, all good")
    return 0


if __name__ == "__main__":
    sys.exit(main())
