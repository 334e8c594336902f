"""Each direction against its own definition."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

import tiny
from loclin.errors import OptionError, PromptError
from loclin.linearization import linearize
from loclin.models import wrap
from loclin.network.points import parse_point
from loclin.steering import Vector, activation_addition, output_basis, pullback, random_direction
from loclin.steering.vector import contrast, hidden_states, mean_difference

POINT = "resid_post.1"


def numbers() -> PreTrainedTokenizerFast:
    """A tokenizer whose words are token ids."""
    words = Tokenizer(WordLevel({"<unk>": 0} | {str(i): i for i in range(1, tiny.VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")


@pytest.fixture
def model():
    hf = tiny.llama(dtype=torch.float64)
    return wrap(hf, numbers())


@pytest.fixture
def lin(model):
    return linearize(model, tiny.prompt(5, seed=4), precision="double")


def states(model, text):
    ids = torch.tensor([[int(word) for word in text.split()]])
    return model.hf(ids, output_hidden_states=True).hidden_states[2][0].detach()


def test_activation_addition_is_the_last_hidden_state(lin):
    hidden = lin.model.hf(lin.input_ids, output_hidden_states=True).hidden_states[2][0, -1]
    torch.testing.assert_close(activation_addition(lin, POINT).direction, hidden.detach(), rtol=1e-4, atol=1e-4)


def test_output_basis_is_the_projected_hidden_state(lin):
    J = lin.jacobian(target=POINT)
    dense = J.dense().flatten(1)
    U = torch.linalg.svd(dense).U[:, :3]
    wanted = U @ U.T @ lin.value(POINT)[-1]
    torch.testing.assert_close(output_basis(lin, POINT, 3).direction, wanted, rtol=1e-8, atol=1e-9)


def test_pullback_is_the_gradient_through_the_frozen_map(lin):
    ids = [5, 17]
    J = lin.jacobian(source=POINT, target="logits").dense()[:, -1]
    h = torch.zeros(J.shape[1], dtype=J.dtype, requires_grad=True)
    logits = lin.value("logits")[-1] + J @ h
    (wanted,) = torch.autograd.grad(logits.log_softmax(-1)[ids].logsumexp(0), h)
    torch.testing.assert_close(pullback(lin, POINT, ids).direction, wanted, rtol=1e-9, atol=1e-10)
    with pytest.raises(OptionError, match="at least one"):
        pullback(lin, POINT, [])


def test_means_and_contrasts(model):
    texts, others = ["3 4 5", "6 7"], ["8 9 10 11"]
    found = mean_difference(model, texts, others, POINT)
    wanted = torch.cat([states(model, t)[1:] for t in texts]).mean(0) - states(model, others[0])[1:].mean(0)
    torch.testing.assert_close(found.direction, wanted)
    pairs = [("3 4 5", "3 6 5"), ("7 8", "9 8"), ("3 11", "12 13")]
    rows = torch.stack([states(model, a)[-1] - states(model, b)[-1] for a, b in pairs])
    direction = contrast(model, pairs, POINT).direction
    top = torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -1]
    assert abs(direction @ top) == pytest.approx(1, abs=1e-9)
    assert direction @ rows.mean(0) > 0
    (before,), (after,) = (hidden_states(model, ["3 4"], parse_point(p, 3)) for p in ("resid_pre.2", POINT))
    assert torch.equal(before, after)
    for wrong in (lambda: contrast(model, [], POINT), lambda: mean_difference(model, [], ["3"], POINT)):
        with pytest.raises(PromptError):
            wrong()
    with pytest.raises(OptionError, match="input or output"):
        random_direction(model, "mlp_out.1")


def test_a_vector_acts_at_every_position_and_needs_no_cache(model, tmp_path):
    vector, ids = random_direction(model, POINT, seed=3), tiny.prompt(6)
    cache = model.hf(ids[:, :4], use_cache=True).past_key_values
    path = tmp_path / "v.safetensors"
    vector.save(path)
    seen = {}
    whole = states(model, " ".join(map(str, ids[0].tolist())))
    with Vector.load(path).apply(model, 0.8):
        both = torch.cat([torch.zeros(2, 1, dtype=torch.long), ids[:, :5].expand(2, -1)], 1)
        mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
        handle = model.hf.model.layers[1].register_forward_hook(lambda _m, _a, out: seen.update(first=out))
        model.hf(both, attention_mask=mask)
        handle.remove()
        handle = model.hf.model.layers[1].register_forward_hook(lambda _m, _a, out: seen.update(new=out))
        model.hf(ids[:, 4:], past_key_values=cache)
        handle.remove()
    h = whole[4:]
    torch.testing.assert_close(seen["first"][0, 1], whole[0])  # the first token is left alone, padding before it or not
    zero_first = states(model, "0 " + " ".join(map(str, ids[0, :5].tolist())))
    torch.testing.assert_close(seen["first"][1, 0], zero_first[0])
    assert (seen["first"][0, 2] - whole[1]).norm() > 0.1
    unit = vector.direction / vector.direction.norm()
    wanted = h + 0.4 * h.norm(dim=1, keepdim=True) * unit
    torch.testing.assert_close(seen["new"][0], wanted, rtol=1e-6, atol=1e-6)
    assert torch.equal(random_direction(model, POINT, seed=3).direction, vector.direction)
