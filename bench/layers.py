"""Every layer, attention and MLP as exact maps, with their spectra: one sweep against the paper's route.

The paper's route is a backward Jacobian of the frozen network to each layer's, attention's and MLP's output, and
scikit-learn's `randomized_svd` of every token's map; each of its runs stops at the output it is after. Both are run in
turns on the same prompt, and both give the k = 8 largest values of every token's map and its Frobenius norm. With
--quick the paper's route is run for every tenth layer, and its time scaled.

Needs the extra `bench`: pip install -c constraints.txt -e ".[bench]"
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

import loclin
from harness import Row, arguments, extra_peak_bytes, in_new_process, report, say, timed
from loclin.freeze import frozen
from loclin.linearization import Linearization
from loclin.maps.layer_maps import COMPONENTS, layer_maps
from loclin.maps.layer_spectra import LayerSpectra
from loclin.models.forward import hidden_output
from models import BUDGET, PROMPT, fresh, packaged

K = 8
_SAMPLE = 10


class _Reached(Exception):
    """The forward pass has come to the output that is wanted."""


def linearized(name: str) -> Linearization:
    """A packaged model at the prompt, without a beginning token: seven tokens for SmolLM2."""
    return loclin.linearize(loclin.load(name), PROMPT, bos=False, memory=BUDGET)


def ours(lin: Linearization, joint: bool = False) -> LayerSpectra:
    """All spectra from one sweep."""
    return lin.layer_spectra(components=COMPONENTS, k=K, joint=joint, normed=False)


def papers(lin: Linearization, layers: range) -> Iterator[tuple[str, int, Tensor]]:
    """The k largest values of every token's map to each component of some layers, the paper's way."""
    from sklearn.utils.extmath import randomized_svd

    for layer in layers:
        for component in COMPONENTS:
            J = torch.autograd.functional.jacobian(_until(lin, component, layer), lin.embeddings, vectorize=True)
            maps = J.transpose(0, 1).numpy()
            found = [randomized_svd(matrix, n_components=K, random_state=0)[1] for matrix in maps]
            np.linalg.norm(maps, axis=(1, 2))
            yield component, layer, torch.from_numpy(np.stack(found))


def _until(lin: Linearization, component: str, layer: int):
    """The frozen network as a function from its embeddings `[T, d]` to a component's output at the last token."""
    hf, block = lin.model.hf, lin.trace.layers[layer].block
    path = {"attn_out": block.sublayers.attn, "mlp_out": block.sublayers.mlp, "resid_post": ""}[component]
    module: nn.Module = block.module.get_submodule(path or "")

    def forward(x: Tensor) -> Tensor:
        found = []

        def reached(_module: nn.Module, _args: object, output: object) -> None:
            found.append(mode.live(hidden_output(output)))
            raise _Reached

        with frozen(hf, lin.trace.options) as mode:
            hidden = lin.trace.layers[0].hidden.clone()
            mode.enter(hidden, x[None])
            handle = module.register_forward_hook(reached)
            try:
                hf.get_decoder()(inputs_embeds=hidden, use_cache=False)
            except _Reached:
                return found[0][0, -1]
            finally:
                handle.remove()
        raise RuntimeError(f"{component}.{layer} was not reached")

    return forward


def measure(name: str, demanded: bool, quick: bool, repeats: int) -> list[Row]:
    """Ours against the dense map and the paper's route."""
    lin = linearized(name)
    n, length = lin.trace.n_layers, lin.trace.length
    label = f"{name}, {length} tokens, {n} layers x {len(COMPONENTS)} components, k={K}"
    seconds: dict[str, list[float]] = {"dense": [], "ours": [], "joint": []}
    found: list[LayerSpectra] = []
    for _ in range(repeats):
        seconds["dense"].append(timed(lambda: fresh(lin).dense()))
        seconds["ours"].append(timed(lambda: found.append(ours(lin))))
        seconds["joint"].append(timed(lambda: ours(lin, joint=True)))
    best = {what: min(times) for what, times in seconds.items()}
    layers = range(0, n, _SAMPLE) if quick else range(n)
    rival: list[tuple[str, int, Tensor]] = []

    def run() -> None:
        for item in papers(lin, layers):
            rival.append(item)
            if item[0] == COMPONENTS[-1]:
                say(f"{label}: the paper's route, layer {item[1]}")

    theirs = timed(run) * n / len(layers)
    spectra = found[-1]
    exact = {(m.component, m.layer): _exact(m.maps) for m in _sampled(lin)}
    S = {key: spectra.S[spectra.index(key[0]), key[1]].double() for key in exact}
    own = max(((exact[key] - S[key]) / exact[key]).abs().max().item() for key in exact)
    paper = max(((exact[c, i] - s) / exact[c, i]).abs().max().item() for c, i, s in rival if (c, i) in exact)
    peak = float(in_new_process(__file__, "--peak-of", name))
    against = "paper's route" + (f", every {_SAMPLE}th layer, scaled" if quick else "")
    most, least = (3.5, 1 / 15) if demanded else (None, None)
    return [
        *(attribution(name, one) for one in (lin, packaged(name))),
        Row(f"{label}: dense J alone", best["dense"], "s"),
        Row(
            f"{label}: lin.layers",
            best["ours"],
            "s",
            "dense J",
            best["ours"] / best["dense"],
            3.5 if demanded else None,
        ),
        Row(f"{label}: lin.layers", best["ours"], "s", against, best["ours"] / theirs, 1 / 15 if demanded else None),
        Row(f"{label}: lin.layers, joint maps too", best["joint"], "s", "dense J", best["joint"] / best["dense"]),
        Row(f"{label}: the paper's route", theirs, "s"),
        Row(f"{label}: lin.layers, extra peak memory", peak / 1e6, "MB", demand=1000.0),
        Row(f"{label}: reconstruction error", spectra.reconstruction_error.max().item(), "relative", demand=1e-6),
        Row(f"{label}: error of a singular value", own, "relative", demand=spectra.tolerance),
        Row(f"{label}: error of a singular value, the paper's route", paper, "relative"),
    ]


def attribution(name: str, lin: Linearization) -> Row:
    """Shares by token against one forward pass of the model; where float32 rounds too much, they are done again."""
    seconds = best_of(lambda: lin.attribute(by="token"))
    forward = best_of(lambda: lin.model.hf(input_ids=lin.input_ids, use_cache=False))
    label = f"{name}, {lin.trace.length} tokens: attribution by token"
    return Row(label, seconds, "s", "one forward pass", seconds / forward, 3.0)


def best_of(work: Callable[[], object], runs: int = 7) -> float:
    """The seconds of the fastest run; the first one warms up what is kept."""
    with torch.no_grad():
        return min(timed(work) for _ in range(runs))


def _sampled(lin: Linearization):
    return (
        m
        for m in layer_maps(lin.chain, "cumulative", lin.trace.length - 1, COMPONENTS, normed=False)
        if m.layer % _SAMPLE == 0
    )


def _exact(maps: Tensor) -> Tensor:
    """The k largest values in float64."""
    return torch.linalg.svdvals(maps.double())[:, :K]


def main() -> None:
    if sys.argv[1:2] == ["--peak-of"]:
        lin = linearized(sys.argv[2])
        print(extra_peak_bytes(lambda: ours(lin)))
        return
    options = arguments(__doc__ or "")
    rows = measure("smollm2-135m", True, options.quick, 2 if options.quick else 3)
    if not options.quick:
        rows += measure("gemma-3-270m", False, options.quick, 3)
    report("layers", rows, options.check)


if __name__ == "__main__":
    main()
