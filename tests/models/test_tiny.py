from __future__ import annotations

from importlib.metadata import version

import pytest
import torch
from packaging.version import Version
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from loclin.errors import ModelError
from loclin.models import tiny
from loclin.models.quiet import quiet

# one of each kind: dense, sliding, parallel, latent, experts, state space, recurrent, hybrid, wrapper, encoder turned
# decoder, old positions, part of a larger config
REPRESENTATIVES = (
    "llama",
    "gemma3",
    "gpt_neox",
    "deepseek_v3",
    "qwen2_moe",
    "gpt_oss",
    "mamba2",
    "rwkv",
    "jamba",
    "qwen3_next",
    "bert",
    "gpt2",
    pytest.param(
        "musicgen",
        marks=pytest.mark.skipif(
            Version(version("transformers")) < Version("5.23"), reason="older configs ask for an encoder"
        ),
    ),
)


def logits(model, ids):
    with torch.no_grad(), quiet():
        return model(ids).logits


def test_every_causal_family_is_there():
    assert tiny.families() == tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))


def test_the_seed_decides_and_the_callers_random_state_stays():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    deterministic = torch.are_deterministic_algorithms_enabled()
    one, same, other = (tiny.build("jamba", seed=seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_nothing_is_printed(capfd):
    tiny.build("gemma3")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", REPRESENTATIVES)
def test_a_tiny_model_depends_on_what_came_before_and_only_on_that(family, dtype):
    model = tiny.build(family, dtype=dtype)
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    ids = tiny.prompt(model)
    changed = ids.clone()
    changed[0, 3] = tiny.prompt(model, 7, seed=2)[0, 3]
    assert changed[0, 3] != ids[0, 3]
    out = logits(model, ids)
    moved = (logits(model, changed) - out)[0].abs().amax(-1)
    assert out.isfinite().all()
    assert (out[0, 0] - out[0, -1]).abs().max() > 1e-3
    assert moved[-1] > 1e-6
    assert moved[:3].max() < 1e-4 * moved.max()


def test_the_precision_changes_no_weight():
    single, double = (tiny.build("falcon", dtype=dtype).state_dict() for dtype in (torch.float32, torch.float64))
    assert all(torch.equal(single[name].double(), double[name].double()) for name in single)


def test_the_prompt_holds_no_special_token():
    model = tiny.build("gemma3")
    config = model.config
    special = {config.image_token_index, config.text_config.pad_token_id, config.text_config.bos_token_id}
    ids = tiny.prompt(model, 60)
    assert ids.shape == (1, 60)
    assert special.isdisjoint(ids.flatten().tolist())


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_attention_is_chosen(attn):
    assert tiny.build("llama", attn=attn).config._attn_implementation == attn


def test_attention_that_a_family_lacks_falls_back():
    assert tiny.build("xglm", attn="sdpa").config._attn_implementation == "eager"


@pytest.mark.parametrize("family", ["gemma4_assistant", "no_such_family"])
def test_a_family_that_cannot_be_built_says_so_in_a_line(family):
    with pytest.raises(ModelError, match=family) as caught:
        tiny.build(family)
    assert "\n" not in str(caught.value)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_every_tiny_model_is_small():
    """On the meta device: a part of a config whose sizes are not known here would be of its full size."""
    large = {}
    for task in tiny.NAMES:
        for family in set(tiny.families(task)) - set(tiny.REFUSED):
            try:
                with torch.device("meta"):
                    model = tiny._model(family, task, None)
            except Exception:  # as many kinds as there are families, each named by `build`
                continue
            if (count := sum(parameter.numel() for parameter in model.parameters())) > 10e6:
                large[family] = count
    assert large == {}
