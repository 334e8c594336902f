"""The least memory budget of a prompt, as the refusal of a smaller one names it."""

from __future__ import annotations

import re
from typing import Any

import pytest

import loclin
from loclin.errors import BudgetError


def named(refusal: BudgetError) -> int:
    """The budget that a refusal asks for."""
    found = re.search(r"give memory=(\d+)", str(refusal))
    assert found
    return int(found[1])


def least(model: Any, ids: Any, **options: Any) -> int:
    """The least budget in which a prompt is linearized."""
    with pytest.raises(BudgetError) as refused:
        loclin.linearize(model, ids, memory=1, **options)
    return named(refused.value)


def within(model: Any, ids: Any, spare: int, **options: Any) -> loclin.Linearization:
    """A prompt with so many bytes to spare, beside what it cannot do without."""
    return loclin.linearize(model, ids, memory=least(model, ids, **options) + 8 * spare // 5, **options)
