"""The grouped matrix product of mixtures of experts: each group of rows has its own matrix."""

from __future__ import annotations

import torch

from loclin.freeze.operation import Operation, Result
from loclin.freeze.status import Live


def grouped_mm(op: Operation) -> Result:
    """`F.grouped_mm(rows, matrices, offs=)`: group by group on the linear path, which works in any dtype."""
    rows, matrices = op.args[0], op.args[1]
    status, offsets, bias = op.status(rows), op.get(2, "offs"), op.get(3, "bias")
    if not isinstance(status, Live) or op.status(matrices) is not None or offsets is None or bias is not None:
        return op.held()
    ends = offsets.tolist()
    parts = [
        status.linear[start:end] @ op.cast(matrices[group])
        for group, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True))
    ]
    rest = status.linear.new_zeros(len(rows) - ends[-1], matrices.shape[-1])
    return status.then(torch.cat([*parts, rest]))
