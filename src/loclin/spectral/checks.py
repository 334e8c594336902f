"""Checks of the options of a spectrum: how many triples, which tolerance, and in which dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from loclin.common.arguments import whole
from loclin.errors import OptionError

_LEAST = 50  # a tolerance is at least this many units of rounding: below, bounds would measure rounding and not the map


def check_rank(k: int, d_out: int, d_in: int) -> None:
    """Refuse, by an OptionError, a number of singular triples that a matrix does not have."""
    most, k = min(d_out, d_in), whole("k", k)
    if not 1 <= k <= most:
        raise OptionError(f"k={k}: the map has {most} singular values, so k is 1 to {most}")


def check_tolerance(tolerance: float, dtype: torch.dtype) -> None:
    """Refuse, by an OptionError, half precision, and a relative tolerance below 50 units of rounding or not below 1."""
    refuse_half(dtype)
    least = least_tolerance(dtype)
    if not tolerance >= least:
        name = str(dtype).removeprefix("torch.")
        raise OptionError(f"tolerance={tolerance:g}: {name} holds no less than {least:.1e}; use that or a wider dtype")
    check_fraction(tolerance)


def check_fraction(tolerance: float) -> float:
    """Refuse, by an OptionError, a tolerance that is not between 0 and 1."""
    if not 0 < tolerance < 1:
        raise OptionError(f"tolerance={tolerance:g}: give a fraction of each value between 0 and 1, such as 1e-3")
    return tolerance


def refuse_half(dtype: torch.dtype) -> None:
    """Refuse, by an OptionError, to decompose a map by products in half precision: rounding would be the result."""
    if wide_dtype(dtype) != dtype:
        name = str(dtype).removeprefix("torch.")
        raise OptionError(
            f"products in {name} are too coarse for a matrix-free method: use method='block_krylov', or linearize with "
            "precision='single'"
        )


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a spectrum is computed: no decomposition takes float16 or bfloat16."""
    return torch.promote_types(dtype, torch.float32)


def to_wide(maps: Tensor) -> Tensor:
    """The same maps in the dtype in which their spectrum is computed."""
    return maps.to(wide_dtype(maps.dtype))


def least_tolerance(dtype: torch.dtype) -> float:
    """The smallest relative tolerance that a dtype holds."""
    return _LEAST * torch.finfo(dtype).eps
