"""Results as pandas tables, for those who have pandas."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from loclin.errors import MissingExtraError
from loclin.results.result import Provenance

if TYPE_CHECKING:
    from pandas import DataFrame


def dataframe(columns: dict[str, Any]) -> DataFrame:
    """A table of equally long columns; needs pandas."""
    try:
        from pandas import DataFrame
    except ImportError as error:
        raise MissingExtraError("to_dataframe()", "pandas", "pandas") from error
    return DataFrame(columns)


def by_rank(columns: dict[str, Tensor], provenance: Provenance | None) -> DataFrame:
    """One row per token and rank, of tensors `[T, k]`; one row per rank, of `[k]`.

    Tokens are numbered by their positions in the prompt, and have their text, where the provenance is known.
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
    return dataframe(named | {name: column.flatten().tolist() for name, column in columns.items()})
