"""Networks whose embeddings, stream and final state differ in width: maps hold, words are there or said not to be."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console
from transformers import OPTConfig, OPTForCausalLM

import loclin
from loclin.analyses.layers import explain_layers
from loclin.common.sums import relative_error
from loclin.linearization import linearize
from loclin.models import tiny as families
from loclin.models import wrap
from loclin.results import display


def projected():
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=97,
        hidden_size=32,
        word_embed_proj_dim=16,
        ffn_dim=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        do_layer_norm_before=False,
    )
    return OPTForCausalLM(config).double().eval()


def streams():
    return families.build("qwen4_exp", dtype=torch.float64, seed=1)


@pytest.fixture(scope="module", params=[projected, streams])
def lin(request):
    hf = request.param()
    return linearize(wrap(hf), families.prompt(hf, 5, 1))


@pytest.mark.sampled(4)
@pytest.mark.parametrize("position", [-1, 1])
@pytest.mark.parametrize("target", ["resid_post.0", "resid_pre.2", "final", "logits"])
def test_maps_with_the_final_norm_on_top_have_its_width(lin, target, position):
    normed = target.startswith("resid")
    J = lin.jacobian(target=target, position=position, normed=normed)
    assert J.shape[0] == J.dense().shape[0] == len(J.value)
    if normed:
        assert len(J.value) == lin.trace.final.shape[-1] != lin.trace.width
    assert relative_error(J.reconstruct() - J.value, J.value) < 1e-5  # norms are in float32
    assert relative_error(sum(J.bias_by_source().values()) - J.bias, J.value) < 1e-5


@pytest.mark.slow
def test_what_has_no_words_is_said_everywhere(lin):
    (warning,) = [said for said in lin.warnings if "wide" in said]
    explained, layers = loclin.explain(lin), explain_layers(lin)
    assert warning in explained.warnings
    assert warning in layers.warnings
    assert all(not block.reads for token in explained.tokens for block in token.blocks)
    assert all(block.writes for token in explained.tokens for block in token.blocks)
    display.show(explained, Console(file=(printed := io.StringIO()), width=200))
    assert "no words" in " ".join(printed.getvalue().split())
    assert "no words" in display.page(explained)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("family", ["deepseek_v2", "mixtral", "qwen3_moe"])
def test_heads_at_other_positions_in_float64(family):
    """What runs before the final state has no linear path there, and is cast as the model casts it."""
    hf = families.build(family, dtype=torch.float64, seed=35)
    lin = linearize(wrap(hf), families.prompt(hf, 3, 35), precision="double")
    for position in range(3):
        J = lin.jacobian(target="logits", position=position)
        assert relative_error(J.reconstruct() - J.value, J.value) < 1e-12
