"""Tiny random models that read images, and prompts with images for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

import tiny

IMAGE, VIDEO, BEGIN, END = 57, 58, 59, 60
_TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4}
_GRID = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_TEXT = {**tiny._SIZES, "hidden_size": 32}
_QWEN = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": BEGIN, "vision_end_token_id": END}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2}


def gemma3(attn: str = "sdpa") -> PreTrainedModel:
    """Gemma 3: the tokens of an image attend to one another."""
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    text = Gemma3TextConfig(
        **tiny._SIZES, head_dim=8, query_pre_attn_scalar=8, sliding_window=4, layer_types=layers, **_TOKENS
    )
    tower = SiglipVisionConfig(**_TOWER, image_size=16)
    config = Gemma3Config(
        text_config=text,
        vision_config=tower,
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=BEGIN,
        eoi_token_index=END,
    )
    config._attn_implementation = attn
    return tiny._shaken(Gemma3ForConditionalGeneration(config), 0, torch.float64)


def llava(attn: str = "sdpa") -> PreTrainedModel:
    """Llava 1.5: CLIP, and a Llama."""
    tower, text = CLIPVisionConfig(**_TOWER, image_size=8), LlamaConfig(**tiny._SIZES)
    config = LlavaConfig(vision_config=tower, text_config=text, image_token_index=IMAGE, vision_feature_layer=-1)
    config._attn_implementation = attn
    return tiny._shaken(LlavaForConditionalGeneration(config), 0, torch.float64)


def qwen2(attn: str = "sdpa") -> PreTrainedModel:
    """Qwen2-VL: positions in three dimensions."""
    tower = {**_GRID, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}
    config = Qwen2VLConfig(text_config={**_TEXT, "rope_parameters": _ROPE, **_TOKENS}, vision_config=tower, **_QWEN)
    config._attn_implementation = attn
    return tiny._shaken(Qwen2VLForConditionalGeneration(config), 0, torch.float64)


def qwen2_5(attn: str = "sdpa") -> PreTrainedModel:
    """Qwen2.5-VL."""
    tower = {**_GRID, "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32, "window_size": 16}
    tower["fullatt_block_indexes"] = [1]
    config = Qwen2_5_VLConfig(text_config={**_TEXT, "rope_parameters": _ROPE, **_TOKENS}, vision_config=tower, **_QWEN)
    config._attn_implementation = attn
    return tiny._shaken(Qwen2_5_VLForConditionalGeneration(config), 0, torch.float64)


def qwen3(attn: str = "sdpa") -> PreTrainedModel:
    """Qwen3-VL: what early layers of the tower give is added behind early layers of the text."""
    tower = {**_GRID, "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32, "num_position_embeddings": 16}
    tower["deepstack_visual_indexes"] = [0, 1]
    text = {**_TEXT, "head_dim": 8, "rope_parameters": _ROPE | {"mrope_interleaved": True}, **_TOKENS}
    config = Qwen3VLConfig(text_config=text, vision_config=tower, **_QWEN)
    config._attn_implementation = attn
    return tiny._shaken(Qwen3VLForConditionalGeneration(config), 0, torch.float64)


def paligemma() -> PreTrainedModel:
    """PaliGemma: all tokens of a prompt attend to one another, by token types that are its own."""
    tower = {"model_type": "siglip_vision_model", **_TOWER, "image_size": 8, "projection_dim": 24}
    text = {"model_type": "gemma", **tiny._SIZES, "head_dim": 8}
    config = PaliGemmaConfig(text_config=text, vision_config=tower, image_token_index=IMAGE, projection_dim=24)
    return tiny._shaken(PaliGemmaForConditionalGeneration(config), 0, torch.float64)


MODELS: dict[str, Callable[..., PreTrainedModel]] = {
    "gemma3": gemma3, "llava": llava, "qwen2_vl": qwen2, "qwen2_5_vl": qwen2_5, "qwen3_vl": qwen3
}  # fmt: skip
SIZES = {"gemma3": (4, 4), "llava": (4, 4), "qwen2_vl": (4, 6), "qwen2_5_vl": (4, 6), "qwen3_vl": (4, 6)}
"""How many tokens each of the two images fills."""


def pixels(name: str) -> dict[str, torch.Tensor]:
    """What a processor would make of two images."""
    noise = torch.Generator().manual_seed(3)
    if not name.startswith("qwen"):
        side = 16 if name == "gemma3" else 8
        return {"pixel_values": torch.randn(2, 3, side, side, generator=noise, dtype=torch.float64).to(tiny.DEVICE)}
    grid = torch.tensor([[1, 4, 4], [1, 4, 6]])
    patches = torch.randn(int(grid.prod(1).sum()), 3 * 2 * 4 * 4, generator=noise, dtype=torch.float64)
    return {"pixel_values": patches.to(tiny.DEVICE), "image_grid_thw": grid.to(tiny.DEVICE)}


def prompt(name: str) -> torch.Tensor:
    """Ids with two images, the second right behind the first for Llava."""
    first, second = SIZES[name]
    between = [] if name == "llava" else [END, 9, BEGIN]
    return torch.tensor([[1, 5, BEGIN, *[IMAGE] * first, *between, *[IMAGE] * second, END, 12, 7]]).to(tiny.DEVICE)


def types(name: str, ids: torch.Tensor) -> dict[str, Any]:
    """What a processor would give for each token."""
    images = (ids == IMAGE).long()
    return {} if name == "llava" else {"token_type_ids" if name == "gemma3" else "mm_token_type_ids": images}


TEMPLATE = (
    "<s>{% for message in messages %}{{ message.role }} {% for part in message.content %}"
    "{{ '<boi>' if part.type == 'image' else part.text }} {% endfor %}{% endfor %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of words, with a beginning token."""
    words = [
        "<unk>",
        "<s>",
        "</s>",
        "user",
        *(f"w{i}" for i in range(4, IMAGE)),
        "<image>",
        "<video>",
        "<boi>",
        "<eoi>",
    ]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, extra_special_tokens=special, **names)


def gemma3_processor() -> ProcessorMixin:
    """Gemma 3's own, without torchvision."""
    images = Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    return Gemma3Processor(images, tokenizer(), chat_template=TEMPLATE, image_seq_length=4)


def llava_processor() -> ProcessorMixin:
    """Llava's own, without torchvision."""
    sizes = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    settings = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    template = TEMPLATE.replace("<boi>", "<image>")
    return LlavaProcessor(LlavaImageProcessorPil(**sizes), tokenizer(), chat_template=template, **settings)


def image(seed: int = 0) -> Image.Image:
    """A picture of noise."""
    noise = torch.randint(256, (20, 24, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(noise.numpy())
