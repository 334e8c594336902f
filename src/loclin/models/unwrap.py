"""What people put around a transformers model, taken off without touching it."""

from __future__ import annotations

from typing import Any

from loclin.errors import ModelError


def unwrapped(model: Any) -> Any:
    """The model inside `torch.compile`'s module and inside a `PeftModel`: its adapters are in its layers.

    Raises
    ------
    ModelError
        For an adapter that is not in the layers: a learned prompt or prefix.
    """
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            _refuse_prompts(model)
            model = model.get_base_model()
        else:
            return model


def _refuse_prompts(model: Any) -> None:
    """Refuse adapters that act outside the base model's layers."""
    for name in (model.active_adapter,) if isinstance(model.active_adapter, str) else model.active_adapter:
        config = model.peft_config[name]
        if config.is_prompt_learning or getattr(config, "alora_invocation_tokens", None):
            kind = str(getattr(config.peft_type, "value", config.peft_type))
            raise ModelError(
                f"The adapter {name!r} ({kind}) is not in the model's layers but in what {type(model).__name__} puts "
                "in front of them; loclin takes adapters inside layers, such as LoRA."
            )
