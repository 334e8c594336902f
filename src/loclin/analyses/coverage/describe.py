"""What a model is made of, in a few words, read off the modules that a prompt runs through and off its config."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loclin.models.quiet import quiet

NONE = "—"
"""A part that the model does not have, or that its modules do not show."""

# what mixes tokens, by how its class's name ends; every other kind of attention is told apart by its heads
_MIXERS = {
    r"(Mixer|MambaLayer)$": "state space",
    r"Delta(Net|Attention)$": "delta rule",
    r"LightningAttention$": "linear attention",
    r"RecurrentBlock$": "gated recurrence",
    r"RwkvSelfAttention$": "RWKV",
    r"LSTMLayer$": "mLSTM",
    r"ShortConv(olution)?$": "short convolution",
    r"LSHSelfAttention$": "LSH",
    r"CrossAttention$": "cross",
}
_SEEN = r"(?<!linear)_attention|sparse|hybrid|global|local"
_ATTENTION = r"(Attention|MLA)$"
_NORM = r"(?:Gated|Unweighted|Weightless|MultiHead)?(?:RMS|Layer|Group|Batch|L2|QK)Norm(?:Gated|\d\w*)?$"
_MLP = r"(MLP|Mlp|FeedForward|FFN|Intermediate|Experts)$"
_GATED = r"gate_proj|gate_up|up_gate|gate_and_up|\bw3\b|\bv1\b|\bWi\b|input_linear|gating"
_GATED_CLASS = r"Gated(?!R)|GLU|Glu|Gating"
_EXPERTS = r"(Experts|MoE|Moe|MoEBlock|MoeBlock)$"
_POSITIONS = {
    "rope": r"Rotary",
    "sinusoidal": r"Sinusoidal",
    "learned": r"LearnedPosition|Axial|\b(wpe|pos\w*_embed\w*|embed_pos\w*) (?!\w*Sinus)",
    "relative": r"Relative|relative|SegmentPosition",
}

_HEADS = ("num_attention_heads", "n_heads", "num_heads", "attention_heads", "decoder_attention_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads")
_LAYER_TYPES = ("layer_types", "layers_block_type", "block_types", "attention_layers")
_ACTIVATIONS = (
    "hidden_act",
    "hidden_activation",
    "activation_function",
    "mlp_hidden_act",
    "activation",
    "ff_activation",
)
_N_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")


@dataclass(frozen=True)
class Description:
    """What a model is made of.

    Attributes
    ----------
    attention
        What mixes tokens: the kind of heads, and which tokens they see; state spaces and their like.
    positions
        How positions enter.
    norm
        The classes of its norms, without the family's name.
    mlp
        Gated or not, the activation, and how many experts.
    """

    attention: str
    positions: str
    norm: str
    mlp: str


def describe_parts(model: PreTrainedModel, input_ids: Tensor) -> Description:
    """Describe the parts of a model that a prompt runs through: a tower that it does not enter is left out.

    Cost: one forward pass. A model that fails at it is described by all its modules.
    """
    modules = _running(model, input_ids)
    config = model.config.get_text_config(decoder=True)
    return Description(
        attention=_attention(config, modules),
        positions=_positions(config, modules),
        norm=_norm(modules),
        mlp=_mlp(config, modules),
    )


def _running(model: PreTrainedModel, input_ids: Tensor) -> dict[str, nn.Module]:
    """Find the modules that are called, by path."""
    called: set[nn.Module] = set()
    everything = dict(model.named_modules())
    handles = [m.register_forward_pre_hook(lambda module, _: called.add(module)) for m in everything.values()]
    try:
        with torch.no_grad(), quiet():
            model(input_ids=input_ids, use_cache=False)
    except Exception:  # the description is no place to fail: the certificate says what is wrong
        return everything
    finally:
        for handle in handles:
            handle.remove()
    return {path: module for path, module in everything.items() if module in called}


def _name(module: nn.Module) -> str:
    return type(module).__name__


def _first(config: Any, names: Iterable[str], kind: type) -> Any:
    """Find the first of several names that the config has a value of this kind for."""
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, kind)), None)


def _joined(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(name for name in names if name)) or NONE


def _mixer(name: str) -> str | None:
    """Name what mixes tokens; empty for attention of the usual kind, None for everything else."""
    for pattern, kind in _MIXERS.items():
        if re.search(pattern, name):
            return kind
    return "" if re.search(_ATTENTION, name) else None


def _attention(config: Any, modules: dict[str, nn.Module]) -> str:
    kinds = [kind for module in modules.values() if (kind := _mixer(_name(module))) is not None]
    usual = [" ".join(filter(None, (_seen(config), _heads(config))))] if "" in kinds else []
    return _joined([*usual, *kinds])


def _heads(config: Any) -> str:
    if getattr(config, "kv_lora_rank", None):
        return "latent"
    heads = _first(config, _HEADS, int)
    shared = 1 if getattr(config, "multi_query", False) is True else _first(config, _KV_HEADS, int)
    if shared is None or shared == heads:
        return "multi-head"
    return "multi-query" if shared == 1 else "grouped"


def _seen(config: Any) -> str:
    """Say which tokens attention sees, where the config tells: full + sliding, say."""
    kinds = _first(config, _LAYER_TYPES, list)
    if kinds is not None:
        named = [str(kind) for kind in kinds if re.search(_SEEN, str(kind))]
        return " + ".join(dict.fromkeys(kind.removesuffix("_attention").replace("_", " ") for kind in named))
    window = getattr(config, "sliding_window", None)
    return "sliding" if window and getattr(config, "use_sliding_window", True) else ""


def _positions(config: Any, modules: dict[str, nn.Module]) -> str:
    seen = [f"{path} {_name(module)}" for path, module in modules.items()]
    found = [kind for kind, pattern in _POSITIONS.items() if any(re.search(pattern, name) for name in seen)]
    if getattr(config, "rotary_dim", None):  # applied without a module
        found.append("rope")
    alibi = (name for module in modules.values() for name in dir(type(module)) if "alibi" in name)
    if getattr(config, "alibi", False) or next(alibi, None):
        found.append("ALiBi")
    return _joined(found)


def _norm(modules: dict[str, nn.Module]) -> str:
    matches = (re.search(_NORM, _name(module)) for module in modules.values())
    return _joined(match[0] for match in matches if match)


def _mlp(config: Any, modules: dict[str, nn.Module]) -> str:
    mixing = [f"{path}." for path, module in modules.items() if _mixer(_name(module)) is not None]
    rest = {p: m for p, m in modules.items() if not f"{p}.".startswith(tuple(mixing)) and re.search(r"\.\d+\b", p)}
    names = [_name(module) for module in rest.values()]
    own = [f"{path}.{name}" for path, module in rest.items() for name, _ in module.named_parameters(recurse=False)]
    gated = any(re.search(_GATED, name) for name in own) or any(re.search(_GATED_CLASS, name) for name in names)
    classes = [name for name in names if re.search(r"Activation$|^(GELU|GELUTanh|ReLU|SiLU|BloomGelu)$", name)]
    if not (gated or classes or any(re.search(_MLP, name) for name in names)):
        return NONE
    written = [name.removesuffix("Activation").lower() for name in dict.fromkeys(classes)]
    activation = _first(config, _ACTIVATIONS, str) or ", ".join(written)
    experts = _first(config, _N_EXPERTS, int) if any(re.search(_EXPERTS, name) for name in names) else None
    kind = f"{'gated' if gated else 'ungated'} {activation}".strip()
    return kind if experts is None else f"{kind}, {experts} experts"
