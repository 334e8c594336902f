"""An explanation's numbers are the map's, its shares sum to the logit, and it survives JSON."""

from __future__ import annotations

import json

import pytest
import torch

import tiny
from loclin.analyses.attribution.attribute import attribute
from loclin.analyses.explain import explain
from loclin.errors import OptionError, PromptError
from loclin.linearization import linearize

BUILDS = {"llama": tiny.llama, "llama-biases": lambda: tiny.llama(biases=True), "gemma3": tiny.gemma3}


@pytest.fixture(params=BUILDS.values(), ids=BUILDS)
def lin(request):
    return linearize(request.param(), tiny.prompt(6), precision="double")


@pytest.mark.parametrize("position", [-1, 2])
def test_shares_sum_to_the_logit_over_the_mean(lin, position):
    found = explain(lin, k=3, position=position)
    logits = lin.model.hf(input_ids=lin.input_ids).logits[0, position]
    assert found.target["id"] == logits.argmax().item()
    assert found.target["logit"] == pytest.approx(logits.max().item(), rel=tiny.rounding())
    total = sum(token.share for token in found.tokens) + found.bias_share
    assert found.target["kind"] == "logit over the mean"
    assert found.target["value"] == pytest.approx((logits.max() - logits.mean()).item(), rel=tiny.rounding())
    assert total + found.share_residual == pytest.approx(found.target["value"], rel=1e-12)
    assert abs(found.share_residual) < 1e-12 * abs(found.target["logit"])
    weights = lin.model.hf.lm_head.weight.detach()
    head = weights[found.target["id"]] - weights.mean(0)
    parts = torch.einsum("o,oti,ti->t", head, lin.jacobian(position=position).dense(), lin.embeddings)
    assert [token.share for token in found.tokens] == pytest.approx(parts.tolist(), abs=1e-10)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("gate", ["activation", "up", "half"])
@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_explain_and_attribute_give_the_same_shares(build, gate):
    lin = linearize(build().float(), tiny.prompt(6), gate=gate)
    for position in (-1, 2):
        found, shared = explain(lin, k=1, position=position), attribute(lin, position=position)
        tokens = [part.share for part in shared.parts if part.kind == "token"]
        biases = [part.share for part in shared.parts if part.kind == "bias"]
        assert [token.share for token in found.tokens] == tokens
        assert found.bias_share == pytest.approx(sum(biases), rel=1e-12)
        assert {name: found.target[name] for name in ("kind", "value", "probability")} == {
            name: shared.target[name] for name in ("kind", "value", "probability")
        }
        assert found.share_residual == shared.residual
        assert found.provenance.gate == shared.provenance.gate == gate


def test_rows_are_rows_and_columns_are_columns(lin):
    """Figure 4A, done right: rows by row norm in input tokens, columns by column norm in output tokens."""
    found, dense = explain(lin, k=2), lin.jacobian().dense()
    embeddings, head = lin.model.hf.get_input_embeddings().weight, lin.model.hf.lm_head.weight
    for i, token in enumerate(found.tokens):
        rows, columns = dense[:, i].norm(dim=1), dense[:, i].norm(dim=0)
        assert [unit.index for unit in token.rows] == rows.topk(5).indices.tolist()
        assert [unit.norm for unit in token.columns] == pytest.approx(columns.topk(5).values.tolist())
        row, column = dense[token.rows[0].index, i], dense[:, i, token.columns[0].index]
        assert token.rows[0].words[0][0] == str(torch.cosine_similarity(embeddings, row[None]).argmax().item())
        assert token.columns[0].words[0][0] == str((head @ column).argmax().item())


def test_numbers_are_those_of_the_map(lin):
    found, J = explain(lin, k=4), lin.jacobian()
    svd = J.svd(4)
    for i, token in enumerate(found.tokens):
        assert token.frobenius_norm == pytest.approx(J.frobenius_norm()[i].item())
        assert token.stable_rank == pytest.approx(J.stable_rank()[i].item())
        assert sum((block.values for block in token.blocks), []) == pytest.approx(svd.S[i].tolist())
        for block in token.blocks:
            if block.gain is not None:
                assert block.gain == pytest.approx((svd.Vh[i, block.indices[0]] @ lin.embeddings[i]).item())
    assert found.certificate.passed
    assert found.reconstruction == pytest.approx(found.output, rel=1e-9, abs=1e-9)
    assert found.ordinary_error > 1e-3


def test_json_holds_everything(lin):
    read = json.loads(explain(lin, k=2).to_json())
    assert read["certificate"]["passed"] is True
    assert read["provenance"]["token_ids"] == lin.input_ids[0].tolist()
    assert len(read["tokens"]) == 6
    assert set(read["provenance"]["versions"]) == {"loclin", "torch", "transformers", "python"}
    assert read["prompt"] == lin.text


def test_tokens_behind_the_position_are_empty(lin):
    token = explain(lin, k=2, position=1).tokens[4]
    assert (token.frobenius_norm, token.stable_rank, token.share) == (0, 0, 0)
    assert token.blocks == token.rows == token.columns == []


def test_one_token_is_enough():
    found = explain(linearize(tiny.llama(), tiny.prompt(1), precision="double"), k=1)
    assert len(found.tokens) == 1
    assert found.certificate.passed


def test_mistakes_are_refused_before_the_work(lin):
    with pytest.raises(OptionError, match="k=0"):
        explain(lin, k=0)
    with pytest.raises(PromptError, match="position 6 is outside the prompt, which has 6 tokens"):
        explain(lin, position=6)


def test_the_notebook_shows_it(lin):
    assert "<table" in explain(lin, k=1)._repr_html_()
