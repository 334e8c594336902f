"""Shares by adapter: how much of a target goes through a LoRA, by module.

The model with its adapters is frozen, and each adapter's output, s B A x, is what it is there. Every path from the
embeddings or a bias to the target meets a last adapter, or none. An adapter's share is the sum of all paths on which it
is the last: its output, times the target's gradient along paths that avoid all adapters behind it. So one sweep down
the model without adapters, with the adapters' outputs as constants, has all shares, and they sum to the target.
"""

from __future__ import annotations

from dataclasses import replace

from loclin.analyses.attribution.readout import Readout
from loclin.analyses.attribution.result import NONE
from loclin.analyses.attribution.shares import Shares, pull_to_sources
from loclin.analyses.attribution.target import Neuron, Target
from loclin.errors import OptionError
from loclin.freeze.adapter import ADAPTER, is_adapted
from loclin.maps.linearized import Linearized
from loclin.network.chain import Chain
from loclin.network.trace import Trace


def share_by_adapter(chain: Chain, readout: Readout) -> Shares:
    """Compute the share of each adapter's output; of the embeddings and of each bias along paths without adapters."""
    trace, options = chain.trace, replace(chain.options, adapters_held=True)
    block, sources, _ = pull_to_sources(Chain(trace, options, explicit=False), readout, look_up=False)
    shares, without, silent = Shares(), dict[str, float](), dict[str, bool]()
    x = trace.layers[0].value[0].double()
    shares.add("embed", (block[0].double() * x).sum().item())
    for name, share in sources.items():
        path = name.removesuffix(f".{ADAPTER}")
        if path == name:
            without[name] = share
            continue
        layer, inside = _place(trace, path)
        shares.add("adapter", share, layer=layer, index=shares.number_bias(f"L{layer}.{inside}" if inside else path))
        silent[inside or path] = silent.get(inside or path, True) and share == 0
    shares.add_biases({name: share for name, share in without.items() if share})
    if any(silent.values()):
        names = ", ".join(name for name, is_silent in silent.items() if is_silent)
        shares.notes.append(
            f"Adapters on {names} act through frozen coefficients alone (attention, gates), and have no share: compare "
            "the prompt with the model without adapters (compare_prompts) to see what they change."
        )
    return shares


def _place(trace: Trace, path: str) -> tuple[int, str]:
    """The layer of a module, and its path from there; nothing where the network is one layer."""
    for index, call in enumerate(trace.layers if trace.sequence.fallback_reason is None else []):
        if path.startswith(f"{call.block.name}."):
            return index, path[len(call.block.name) + 1 :]
    return NONE, ""


def check_adapters(lin: Linearized, target: Target) -> list[str]:
    """Refuse a model without active adapters, or whose adapters cannot be told apart; say what is not among them."""
    if isinstance(target, Neuron):
        raise OptionError(
            "a neuron reads adapters of its own layer: by='adapter' is for the stream, final and the logits"
        )
    hf, name = lin.trace.model.hf, lin.model.info.name
    modules = dict(hf.named_modules())
    adapted = {path: module for path, module in modules.items() if is_adapted(module)}
    if not adapted:
        raise OptionError(f"{name} has no active adapter: load it with adapter=, or wrap the model that has one")
    if merged := [path for path, module in adapted.items() if module.merged]:
        raise OptionError(f"{name}: the adapter is merged into the weights of {merged[0]}: unmerge it first")
    if inside := [path for path, module in adapted.items() if type(module).__name__ == "ParamWrapper"]:
        raise OptionError(f"{name}: the adapter on {inside[0]} is part of its weight, and cannot be told apart")
    blocks = {call.block.module for call in lin.trace.layers}
    held = {module for block in blocks for module in block.modules()}
    outside = [path for path, module in adapted.items() if module not in held]
    whole = [
        path
        for path, module in modules.items()
        if any(base.__name__ == "AuxiliaryTrainingWrapper" for base in type(module).__mro__)
    ]
    if others := [*outside, *whole]:
        return [f"What was trained at {', '.join(others)} counts with the model, and not as an adapter."]
    return []
