"""Groups of tokens, such as words, with the sums of their tokens' shares."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from rich.text import Text

from loclin.analyses.attribution.groups import Group
from loclin.report.sheet import full_size
from loclin.report.table import BAR, COUNTER, Bar, Column, Table
from loclin.report.text import signed, visible

_LONGEST = 60


def full_group(groups: Sequence[Group], shares: Sequence[float], apart: Collection[int]) -> float:
    """Find the |share| of a group to draw in full: the largest without a position that is apart."""
    pairs = zip(groups, shares, strict=True)
    return full_size((share, bool(set(apart) & set(group.positions))) for group, share in pairs)


def group_table(
    head: str, groups: Sequence[Group], shares: Sequence[float], full: float, skipped: Collection[int], most: int
) -> tuple[Table, list[int]]:
    """Give a row to each of the groups of largest share, in the order of the prompt; and say which these are."""
    ranked = sorted(range(len(groups)), key=lambda i: -abs(shares[i]))
    shown = sorted([i for i in ranked if not set(groups[i].positions) <= set(skipped)][:most])
    table = Table.of(COUNTER, Column(head, "key"), "share", BAR, "tokens")
    for i in shown:
        held = groups[i].positions
        name = Text(visible(groups[i].name, _LONGEST), "bold")
        table.add(str(held[0]), name, signed(shares[i]), Bar(shares[i] / full), str(len(held)))
    return table, shown
