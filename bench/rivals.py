"""The k largest singular values of every token's map, or of all side by side: by each of our routes and by others'.

Others decompose a dense map, the paper's own way of making one or ours, but for SciPy, which gets products alone.
Packages run as they come; where they ask how far to go, what they are given stands in the route's name.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loclin.linearization import Linearization
from models import fresh, whole_graph

K = 8
TOLERANCE = 1e-3
METHODS = ("lapack", "block_krylov", "matrix_free", "auto")
AUTO = "loclin svd, auto"
PAPER = "paper: autograd jacobian + randomized_svd"
HYBRID = "loclin dense J + randomized_svd"
DENSE = "loclin dense J alone"
_LOWRANK = 2 * K
_DEPTH = 6 * K


@dataclass(frozen=True)
class Outcome:
    """Values `[M, k]` of M matrices, the columns spent, the largest relative error stated, and the method used."""

    S: Tensor
    columns: int
    certified: float = math.nan
    method: str = ""

    def error(self, truth: Tensor) -> float:
        """The largest relative error of any value."""
        k = self.S.shape[1]
        return ((self.S.double() - truth[:, :k]) / truth[:, :k]).abs().max().item() if k else math.nan


def routes_of(lin: Linearization, joint: bool) -> dict[str, Callable[[], Outcome]]:
    """Every route by its name; each starts from nothing."""
    _check_installed()
    routes = {DENSE: lambda: Outcome(torch.empty(1, 0), len(fresh(lin).dense()))}
    routes |= {f"loclin svd, {method}": partial(ours, lin, joint, method) for method in METHODS}
    routes[PAPER] = lambda: _decomposed(_papers_jacobian(lin), joint, _randomized)
    routes[HYBRID] = lambda: _decomposed(fresh(lin).dense(), joint, _randomized)
    routes[f"loclin dense J + torch.svd_lowrank(q={_LOWRANK})"] = lambda: _decomposed(
        fresh(lin).dense(), joint, _lowrank
    )
    if joint:
        routes["scipy svds(J.to_scipy())"] = lambda: _scipy(lin)
    if find_spec("matfree") and find_spec("jax"):
        routes[f"loclin dense J + matfree bidiag({_DEPTH})"] = lambda: _decomposed(fresh(lin).dense(), joint, _matfree)
    return routes


def ours(lin: Linearization, joint: bool, method: str, k: int = K, tolerance: float = TOLERANCE) -> Outcome:
    """`J.svd` by one method, from nothing."""
    J = fresh(lin)
    found = J.svd(k, joint=joint, tolerance=tolerance, method=method)
    return Outcome(found.S.reshape(-1, k), J.columns, found.relative_error.max().item(), found.method)


def matrices(dense: Tensor, joint: bool) -> Tensor:
    """`[T, d_out, d_in]`, or joint `[1, d_out, T d_in]`."""
    return dense.flatten(1)[None] if joint else dense.transpose(0, 1).contiguous()


def truth(dense: Tensor, joint: bool) -> Tensor:
    """All singular values in float64, `[T, r]` or `[1, r]`."""
    return torch.stack([torch.linalg.svdvals(matrix.double()) for matrix in matrices(dense, joint)])


def _decomposed(dense: Tensor, joint: bool, method: Callable[[Tensor], Tensor]) -> Outcome:
    return Outcome(method(matrices(dense, joint)), len(dense))


def _papers_jacobian(lin: Linearization) -> Tensor:
    return torch.autograd.functional.jacobian(whole_graph(lin), lin.embeddings, vectorize=True)


def _randomized(maps: Tensor) -> Tensor:
    from sklearn.utils.extmath import randomized_svd

    found = [randomized_svd(matrix.numpy(), n_components=K, random_state=0)[1] for matrix in maps]
    return torch.from_numpy(np.stack(found))


def _lowrank(maps: Tensor) -> Tensor:
    torch.manual_seed(0)
    return torch.svd_lowrank(maps, q=_LOWRANK)[1][:, :K]


def _scipy(lin: Linearization) -> Outcome:
    from scipy.sparse.linalg import svds

    J = fresh(lin)
    start = np.random.default_rng(0).standard_normal(J.shape[0]).astype(np.float32)
    S = svds(J.to_scipy(), k=K, v0=start, return_singular_vectors=False)
    return Outcome(torch.from_numpy(np.sort(S)[::-1].copy())[None], J.columns)


def _matfree(maps: Tensor) -> Tensor:
    import jax.numpy as jnp

    start = jnp.ones(maps.shape[2])
    found = [_compiled()(jnp.asarray(matrix.numpy()), start)[:K] for matrix in maps]
    return torch.from_numpy(np.stack(found))


@cache
def _compiled() -> Callable[[Any, Any], Any]:
    import jax
    from matfree import decomp, eig

    svd = eig.svd_partial(decomp.bidiag(_DEPTH))
    return jax.jit(lambda matrix, start: svd(lambda x: matrix @ x, start)[1])


def _check_installed() -> None:
    missing = [name for name, module in {"scikit-learn": "sklearn", "scipy": "scipy"}.items() if not find_spec(module)]
    if missing:
        sys.exit(f'{" and ".join(missing)} not installed: pip install -c constraints.txt -e ".[bench]"')
