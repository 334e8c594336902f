"""The parts of a model in a few words, from its config and from the modules that a prompt runs through."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loclin.models.forward import hooked
from loclin.models.quiet import quiet

NONE = "—"
"""Stands for a part that the model does not have, or that its modules do not show."""

# mixers of tokens, by the end of their class names; ordinary attention, the last, is classified by its heads
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
    r"(Attention|MLA)$": "",
}
_SEEN = r"(?<!linear)_attention|sparse|hybrid|global|local"
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
    "hidden_act", "hidden_activation", "activation_function", "mlp_hidden_act", "activation", "ff_activation",
)  # fmt: skip
_N_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")


@dataclass(frozen=True)
class Description:
    """The parts of a model."""

    attention: str  # the mixers of tokens: the kind of attention heads and what they see, state spaces, and so on
    positions: str  # the kind of position encoding
    norm: str  # the classes of its norms, without the name of the family
    mlp: str  # gated or not, the activation, and the number of experts


def describe_parts(model: PreTrainedModel, input_ids: Tensor) -> Description:
    """Describe the parts that a prompt runs through, by one forward pass; all modules of the model if it fails."""
    modules, config = _find_called(model, input_ids), model.config.get_text_config(decoder=True)
    mixers = [kind for module in modules.values() if (kind := _classify_mixer(module)) is not None]
    usual = f"{_describe_span(config)} {_classify_heads(config)}".strip() if "" in mixers else ""
    norms = (re.search(_NORM, _class_name(module)) for module in modules.values())
    return Description(
        attention=_join([usual, *mixers]),
        positions=_describe_positions(config, modules),
        norm=_join(match[0] for match in norms if match),
        mlp=_describe_mlp(config, modules),
    )


def _find_called(model: PreTrainedModel, input_ids: Tensor) -> dict[str, nn.Module]:
    """Find the modules that are called in a forward pass, by path."""
    called: set[nn.Module] = set()
    everything = dict(model.named_modules())
    handles = [m.register_forward_pre_hook(lambda module, _: called.add(module)) for m in everything.values()]
    try:
        with torch.no_grad(), quiet(), hooked(handles):
            model(input_ids=input_ids, use_cache=False)
    except Exception:  # a description should not fail: the certificate reports the error
        return everything
    return {path: module for path, module in everything.items() if module in called}


def _class_name(module: nn.Module) -> str:
    return type(module).__name__


def _find_first(config: Any, names: Iterable[str], kind: type) -> Any:
    """Return the first value of this kind that the config has under one of several names."""
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, kind)), None)


def _join(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(name for name in names if name)) or NONE


def _classify_mixer(module: nn.Module) -> str | None:
    """Name the kind of token mixer of a module: empty for ordinary attention, None if it does not mix tokens."""
    return next((kind for pattern, kind in _MIXERS.items() if re.search(pattern, _class_name(module))), None)


def _classify_heads(config: Any) -> str:
    if getattr(config, "kv_lora_rank", None):
        return "latent"
    heads = _find_first(config, _HEADS, int)
    shared = 1 if getattr(config, "multi_query", False) is True else _find_first(config, _KV_HEADS, int)
    if shared is None or shared == heads:
        return "multi-head"
    return "multi-query" if shared == 1 else "grouped"


def _describe_span(config: Any) -> str:
    """Say which tokens attention sees, if the config tells: for example full + sliding."""
    kinds = _find_first(config, _LAYER_TYPES, list)
    if kinds is not None:
        named = [str(kind) for kind in kinds if re.search(_SEEN, str(kind))]
        return " + ".join(dict.fromkeys(kind.removesuffix("_attention").replace("_", " ") for kind in named))
    window = getattr(config, "sliding_window", None)
    return "sliding" if window and getattr(config, "use_sliding_window", True) else ""


def _describe_positions(config: Any, modules: dict[str, nn.Module]) -> str:
    seen = [f"{path} {_class_name(module)}" for path, module in modules.items()]
    found = [kind for kind, pattern in _POSITIONS.items() if any(re.search(pattern, name) for name in seen)]
    if getattr(config, "rotary_dim", None):  # applied without a module
        found.append("rope")
    alibi = (name for module in modules.values() for name in dir(type(module)) if "alibi" in name)
    if getattr(config, "alibi", False) or next(alibi, None):
        found.append("ALiBi")
    return _join(found)


def _describe_mlp(config: Any, modules: dict[str, nn.Module]) -> str:
    mixing = [f"{path}." for path, module in modules.items() if _classify_mixer(module) is not None]
    rest = {p: m for p, m in modules.items() if not f"{p}.".startswith(tuple(mixing)) and re.search(r"\.\d+\b", p)}
    names = [_class_name(module) for module in rest.values()]
    own = [f"{path}.{name}" for path, module in rest.items() for name, _ in module.named_parameters(recurse=False)]
    gated = any(re.search(_GATED, name) for name in own) or any(re.search(_GATED_CLASS, name) for name in names)
    classes = [name for name in names if re.search(r"Activation$|^(GELU|GELUTanh|ReLU|SiLU|BloomGelu)$", name)]
    if not (gated or classes or any(re.search(_MLP, name) for name in names)):
        return NONE
    written = [name.removesuffix("Activation").lower() for name in dict.fromkeys(classes)]
    activation = _find_first(config, _ACTIVATIONS, str) or ", ".join(written)
    experts = _find_first(config, _N_EXPERTS, int) if any(re.search(_EXPERTS, name) for name in names) else None
    kind = f"{'gated' if gated else 'ungated'} {activation}".strip()
    return kind if experts is None else f"{kind}, {experts} experts"
