"""Every fuzz target, bounded and always with the same examples; `make fuzz` runs them on and on with new ones."""

from __future__ import annotations

import pytest

from tests.property.fuzz import TARGETS
from tests.property.fuzz.mutations import Corpus
from tests.property.fuzz.target import Target


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "corpus"), [(target, corpus) for target in TARGETS for corpus in target.corpora], ids=repr
)
def test_whatever_comes(target: Target, corpus: Corpus) -> None:
    """What the target's check says holds for every example."""
    corpus.require()
    assert target.run(corpus) >= target.examples // 2
