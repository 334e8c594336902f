"""Results as pandas tables, if pandas is installed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from loclin.errors import MissingExtraError
from loclin.results.provenance import Provenance

if TYPE_CHECKING:
    from pandas import DataFrame


def dataframe(columns: dict[str, Any]) -> DataFrame:
    """Make a table from columns of equal length; raises MissingExtraError when pandas is not installed."""
    try:
        from pandas import DataFrame
    except ImportError as error:
        raise MissingExtraError("to_dataframe()", "pandas", "pandas") from error
    return DataFrame(columns)


def make_columns(names: str, rows: Iterable[tuple[Any, ...]]) -> dict[str, list[Any]]:
    """Make columns, by their names with spaces between, from rows."""
    found = list(rows)
    return {name: [row[i] for row in found] for i, name in enumerate(names.split())}


def by_rank(columns: dict[str, Tensor], provenance: Provenance | None) -> dict[str, list[Any]]:
    """Make columns from tensors `[T, k]`, one row per token and rank, or `[k]`, one row per rank.

    Tokens are numbered by their positions in the prompt, and have a text if the provenance is known.
    """
    first = next(iter(columns.values()))
    k = first.shape[-1]
    named: dict[str, Any] = {}
    if first.dim() == 2:
        positions = list(range(len(first))) if provenance is None else provenance.positions
        named["token"] = [position for position in positions for _ in range(k)]
        if provenance is not None:
            named["text"] = [provenance.tokens[position] for position in named["token"]]
    named["rank"] = list(range(k)) * (first.numel() // k)
    return named | {name: column.flatten().tolist() for name, column in columns.items()}
