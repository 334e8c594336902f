"""Random networks, maps, precisions, tokenizers and surroundings: every map holds, every refusal is one line.

A few in CI, always the same; as many as are asked for by hand, always others:

    python -m pytest tests/fuzz --examples 1000 -s
"""

from __future__ import annotations

import pytest
from checks import Tally
from combinations import combination
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

PARTS = 2
"""Tests that share the examples, for two processes."""
FEW = 16


@pytest.mark.slow
@pytest.mark.long_for("1")
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.filterwarnings("default")
def test_random_combinations(request, part):
    asked = request.config.getoption("examples")
    tally = Tally()

    @settings(
        max_examples=(asked or FEW) // PARTS,
        derandomize=asked is None,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.randoms(use_true_random=True))
    def tried(random):
        tally.add(combination(random))

    (tried if asked else seed(part)(tried))()
    print(f"\n{tally}")
    faults = [*tally.mismatches, *tally.exceptions]
    assert not faults, "\n".join([str(tally), *faults])
    assert tally.computed
