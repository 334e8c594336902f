"""How checkpoints with quantised weights are read: kept by their library, dequantised while loading, or not at all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loclin.errors import ModelError
from loclin.models.options import installed

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

PACKED = ("awq", "gptq", "hqq")
"""Methods whose weights `loclin.models.packed` dequantises: their own libraries need a compiler or a GPU."""
_BY_TRANSFORMERS = {
    "compressed-tensors": "CompressedTensorsConfig",
    "fp8": "FineGrainedFP8Config",
    "mxfp4": "Mxfp4Config",
    "mxfp8": "FineGrainedFP8Config",
}
"""Methods whose weights transformers dequantises while it loads them, and the class of its options."""
_KEPT = ("bitsandbytes", "quanto", "torchao")
"""Methods whose weights stay as they are; `loclin.freeze.quantised` dequantises them a layer at a time."""
_LIBRARIES = {
    "bitsandbytes": ("bitsandbytes", "bitsandbytes"),
    "compressed-tensors": ("compressed_tensors", "compressed-tensors"),
    "quanto": ("optimum.quanto", "optimum-quanto"),
    "torchao": ("torchao", "torchao"),
}
"""The module that a method needs, and its name for pip."""
_ROUNDS = ("bitnet", "fbgemm_fp8", "fouroversix", "fp_quant")


def settings_of(config: PreTrainedConfig) -> dict[str, Any]:
    """A config's `quantization_config`; empty for plain weights."""
    found: Any = getattr(config, "quantization_config", None)
    settings = found.to_dict() if hasattr(found, "to_dict") else dict(found or {})
    method = settings.get("quant_method")
    return settings | {"quant_method": str(getattr(method, "value", method))} if settings else {}


def refuse_quantised(settings: dict[str, Any], name: str) -> None:
    """Refuse weights that cannot be read, or whose layers are no affine maps, before any of them is read."""
    method = settings["quant_method"]
    if method in _ROUNDS or _rounds_inputs(settings):
        raise ModelError(
            f"{name} is quantised by {method} and rounds the inputs of its layers as well as their weights, so that "
            f"it is no affine map of its input: give a checkpoint whose weights alone are rounded{_alone(method)}"
        )
    if method not in (*PACKED, *_BY_TRANSFORMERS, *_KEPT):
        raise ModelError(
            f"{name} is quantised by {method}, which loclin does not read: give the plain checkpoint, or one by "
            f"{', '.join(sorted({*PACKED, *_BY_TRANSFORMERS, *_KEPT}))}; or load it yourself, and wrap() it"
        )
    module, package = _LIBRARIES.get(method, ("", ""))
    if module and not installed(module):
        raise ModelError(f"{name} is quantised by {method}, which needs {package}: pip install {package}")


def with_options(settings: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments for `from_pretrained`, which say to dequantise what transformers can dequantise."""
    import transformers

    kind = _BY_TRANSFORMERS.get(settings.get("quant_method", ""))
    if kind is None or "quantization_config" in arguments or arguments.get("stream"):
        return arguments  # streaming dequantises by itself
    return arguments | {"quantization_config": getattr(transformers, kind)(dequantize=True)}


def note_dequantised(settings: dict[str, Any], name: str) -> str:
    """What results say where kernels that round the inputs of layers exist for a checkpoint; else nothing."""
    if settings.get("quant_method") not in ("fp8", "mxfp8"):
        return ""
    return (
        f"The weights of {name} are dequantised from {settings['quant_method']}: the map is that of these weights. "
        "Kernels that also round the inputs of its layers, as GPUs have, compute another function."
    )


def _rounds_inputs(settings: dict[str, Any]) -> bool:
    """Whether a config stores how to round the inputs of layers; what a kernel may do beside that, a note says."""
    groups = settings.get("config_groups") or {}
    scheme = settings.get("activation_scheme")
    return scheme == "static" or any(group.get("input_activations") for group in groups.values())


def _alone(method: str) -> str:
    """How to take the weights of such a checkpoint alone, where that is possible."""
    kind = _BY_TRANSFORMERS.get(method)
    return f"; or take its weights alone: load(..., quantization_config={kind}(dequantize=True))" if kind else ""
