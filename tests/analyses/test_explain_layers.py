"""Layers explained: numbers are the spectra's, words and ranks those of a plain argsort, the lens the model's own."""

from __future__ import annotations

import json
from dataclasses import fields
from functools import cache

import pytest
import torch

import tiny
from loclin.analyses import layers
from loclin.analyses.decode import Decoder
from loclin.analyses.layers import SHOWN, explain_layers
from loclin.analyses.logit_lens import compute_layer_logits, logit_lens
from loclin.errors import OptionError, PromptError
from loclin.linearization import linearize
from loclin.maps.layer_maps import layer_maps
from loclin.models import tiny as families
from loclin.models import wrap

BUILDS = {"llama": tiny.llama, "llama-biases": lambda: tiny.llama(biases=True), "gemma3": tiny.gemma3}


@cache
def built(name, position=-1):
    lin = linearize(BUILDS[name](), tiny.prompt(6), precision="double")
    return lin, explain_layers(lin, k=4, position=position)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", BUILDS)
def test_every_layer_and_component(name):
    lin, found = built(name)
    L, T = lin.trace.n_layers, 6
    assert [component.name for component in found.components] == ["attn_out", "mlp_out", "resid_post"]
    assert found.n_layers == L
    assert found.passed
    assert found.largest_error < 1e-12
    for component in found.components:
        assert [len(spectrum) for spectrum in component.joint_spectra] == [4] * L
        assert [len(ranks) for ranks in component.token_stable_rank] == [T] * L
        assert [len(row) for row in component.token_vectors] == [T] * L
        for blocks in [*component.joint_vectors, *(b for row in component.token_vectors for b in row)]:
            assert [i for block in blocks for i in block.indices][:SHOWN] in ([0, 1, 2], [])
        zero = [[rank == 0 for rank in ranks] for ranks in component.token_stable_rank]  # beyond a sliding window
        assert [[blocks == [] for blocks in row] for row in component.token_vectors] == zero
        assert all(component.joint_vectors)


@pytest.mark.parametrize(("name", "position"), [("llama", -1), ("gemma3", 3)])
def test_numbers_are_those_of_dense_maps(name, position):
    lin, found = built(name, position)
    at = lin.trace.position(position)
    for mode, joint, token in (
        ("cumulative", "joint_stable_rank", "token_stable_rank"),
        ("layerwise", "joint_own_rank", "token_own_rank"),
    ):
        for item in layer_maps(lin.chain, mode, at, ("attn_out", "mlp_out", "resid_post")):
            (component,) = [c for c in found.components if c.name == item.component]
            S = torch.linalg.svdvals(item.joint)
            assert getattr(component, joint)[item.layer] == pytest.approx(
                (S.square().sum() / S[0] ** 2).item(), rel=1e-6
            )
            own = torch.linalg.svdvals(item.maps)
            ranks = (own.square().sum(1) / own[:, 0].square()).nan_to_num()
            assert getattr(component, token)[item.layer] == pytest.approx(ranks.tolist(), rel=1e-6)
            if mode == "cumulative":
                assert component.joint_sigma1[item.layer] == pytest.approx(S[0].item(), rel=1e-6)
                assert component.joint_spectra[item.layer] == pytest.approx((S[:4] / S[0]).tolist(), rel=1e-6)


@pytest.mark.parametrize("name", BUILDS)
def test_the_path_ends_at_one(name):
    _, found = built(name)
    for component in found.components:
        assert component.path[-1] == pytest.approx([1, 1], abs=1e-12)
        assert all(0 <= number <= 1 for point in component.path for number in point)
        assert component.path_defined[-1]
    U = found.spectra.joint_U[2]
    assert found.main.path[0] == pytest.approx([abs((U[0, :, j] @ U[-1, :, j]).item()) for j in (0, 1)])


def test_words_and_ranks_are_those_of_an_argsort():
    lin, found = built("llama")
    head = lin.model.hf.lm_head.weight.detach()
    embeddings = torch.nn.functional.normalize(lin.model.hf.get_input_embeddings().weight.detach(), dim=1)
    chosen = found.target["id"]
    spectra = found.spectra
    for c, component in enumerate(found.components):
        for layer in range(found.n_layers):
            for place, blocks, rank in (
                (spectra.joint_U[c, layer], component.joint_vectors[layer], component.joint_word_rank[layer]),
                (spectra.U[c, layer, 5], component.token_vectors[layer][5], component.token_word_rank[layer]),
            ):
                order = (head @ place[:, 0]).argsort(descending=True).tolist()
                assert [int(word) for word, _ in blocks[0].writes] == order[:5]
                assert rank == order.index(chosen) + 1
            for j, block in enumerate(component.token_vectors[layer][2]):
                v = spectra.Vh[c, layer, 2, j]
                assert [int(word) for word, _ in block.reads] == (embeddings @ v).argsort(descending=True)[:5].tolist()
                assert block.gain == pytest.approx((v @ lin.embeddings[2]).item())


@pytest.mark.parametrize("name", BUILDS)
def test_signs_towards_the_final_prediction(name):
    """As the author shows layers: every left vector points towards the final hidden state; the maps are the same."""
    lin, own = built(name)
    found = explain_layers(lin, k=4, signs="final")
    y = lin.value("final")[-1]
    for U, before in ((found.spectra.U, own.spectra.U), (found.spectra.joint_U, own.spectra.joint_U)):
        assert (torch.einsum("d,...dk->...k", y, U) >= 0).all()
        assert torch.equal(U.abs(), before.abs())
    turned = (found.spectra.joint_U != own.spectra.joint_U).any(-2)
    assert 0 < turned.sum() < turned.numel()
    product = torch.einsum("...dk,...k,...ki->...di", found.spectra.U, found.spectra.S, found.spectra.Vh)
    same = torch.einsum("...dk,...k,...ki->...di", own.spectra.U, own.spectra.S, own.spectra.Vh)
    torch.testing.assert_close(product, same, rtol=1e-12, atol=1e-12)
    assert found.main.path == own.main.path
    decoder = Decoder(lin.model)
    for layer in range(found.n_layers):
        blocks = found.main.joint_vectors[layer]
        alone = [block for block in blocks if len(block.indices) == 1]
        vectors = torch.stack([found.spectra.joint_U[2, layer, :, block.indices[0]] for block in alone])
        written = [[word for word, _ in words] for words in decoder.writes(vectors, 5)]
        assert [[word for word, _ in block.writes] for block in alone] == written
    assert (found.settings["signs"], own.settings["signs"]) == ("final", "layer")
    with pytest.raises((OptionError, TypeError)):
        explain_layers(lin, k=4, signs="free")


def test_near_equal_vectors_are_one_space(monkeypatch):
    lin, _ = built("llama")
    spectra = lin.layer_spectra(k=4)
    spectra.S[2, 1, 3, 1] = spectra.S[2, 1, 3, 0] * (1 - 1e-5)
    spectra.joint_S[0, 2, 2] = spectra.joint_S[0, 2, 1] * (1 - 1e-5)
    own = layers.layer_spectra
    monkeypatch.setattr(layers, "layer_spectra", lambda lin, **o: spectra if "mode" not in o else own(lin, **o))
    found = explain_layers(lin, k=4, position=3)
    pair, *others = found.components[2].token_vectors[1][3]
    assert pair.indices == [0, 1]
    assert pair.gain is None
    decoder = Decoder(lin.model)
    assert pair.writes == decoder.writes_subspace(spectra.U[2, 1, 3, :, :2], 5)
    assert pair.reads == decoder.reads_subspace(spectra.Vh[2, 1, 3, :2].T, 5)
    assert [block.indices for block in others] == [[2]]
    assert found.components[2].token_word_rank[1] is None, "the first vector is not defined there"
    assert found.components[0].path_defined == [False] * 3, "the last layer's second vector is not defined"
    assert found.components[0].joint_vectors[2][1].indices == [1, 2]


def test_where_a_word_appears():
    _, found = built("llama")
    ranks = {"lens": [layer.rank for layer in found.lens], "mlp_out token": found.components[1].token_word_rank}
    for reader, own in ranks.items():
        assert found.leads[reader] == next((i for i, rank in enumerate(own) if rank == 1), None)
        assert found.appears[reader] == next((i for i, rank in enumerate(own) if rank <= 10), None)
    assert found.leads["lens"] is not None
    assert set(found.leads) == {"lens"} | {f"{c.name} {of}" for c in found.components for of in ("joint", "token")}


def test_the_lens_is_the_models_own_head():
    model = tiny.gemma3(dtype=torch.float32)
    lin = linearize(model, tiny.prompt(6))
    hidden = model(lin.input_ids, output_hidden_states=True).hidden_states  # transformers norms the last one itself
    for position in (-1, 2):
        expected = [model.lm_head(model.model.norm(h[0, position])) for h in hidden[1:-1]]
        expected.append(model.lm_head(hidden[-1][0, position]))
        found = compute_layer_logits(lin, position)
        assert torch.allclose(found, torch.stack(expected), rtol=1e-4, atol=1e-5)
        lens = logit_lens(lin, 7, position=position, k=3)
        for layer, logits in zip(lens, expected, strict=True):
            probabilities = torch.softmax(logits.double(), 0)
            order = probabilities.argsort(descending=True).tolist()
            assert layer.rank == order.index(7) + 1
            assert layer.probability == pytest.approx(probabilities[7].item(), rel=1e-4)
            assert [int(word) for word, _ in layer.words] == order[:3]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("family", ["gemma2", "cohere", "gpt2", "opt", "bloom", "granite", "gpt_neox"])
def test_the_last_layer_of_the_lens_is_the_model(family):
    """Soft caps, logit scales, biases and projections included."""
    model = families.build(family)
    lin = linearize(model, tiny.prompt(6), precision="double")
    found = compute_layer_logits(lin, 4)
    assert torch.allclose(found[-1], model(lin.input_ids).logits[0, 4], rtol=1e-4, atol=1e-5)  # stock casts
    assert len(found) == lin.trace.n_layers
    assert not torch.allclose(found[0], found[-1])
    assert not model.get_output_embeddings()._forward_hooks
    assert not lin.trace.sequence.exit._forward_hooks


def test_ranks_do_not_depend_on_how_the_head_is_cut(monkeypatch):
    decoder = Decoder(wrap(tiny.llama()))
    vectors = torch.randn(5, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores = vectors @ decoder.model.hf.lm_head.weight.detach().T
    expected = [row.argsort(descending=True).tolist().index(17) + 1 for row in scores]
    assert decoder.ranks(vectors, 17) == expected
    monkeypatch.setattr("loclin.analyses.decode._BLOCK_BYTES", 4 * 29 * 4)
    assert decoder.ranks(vectors, 17) == expected


def test_tokens_behind_the_position_have_no_words():
    _, found = built("gemma3", 3)
    for component in found.components:
        assert all(row[4] == [] for row in component.token_vectors)
        assert all(row[3] for row in component.token_vectors)


def test_json_holds_everything():
    _, found = built("llama-biases")
    read = json.loads(found.to_json())
    assert read["passed"] is True
    assert read["largest_error"] == found.largest_error
    assert read["lens"][1]["rank"] == found.lens[1].rank
    assert read["components"][2]["path"] == found.main.path
    block = read["components"][1]["token_vectors"][2][3][0]
    assert block["values"] == found.components[1].token_vectors[2][3][0].values
    assert {field.name for field in fields(found)} - {"spectra"} <= set(read)
    assert "spectra" not in read  # they have a file of their own
    for ours, theirs in zip(found.components, read["components"], strict=True):
        assert {field.name for field in fields(ours)} <= set(theirs)


def test_chosen_components():
    lin, _ = built("llama")
    found = explain_layers(lin, k=2, components=["mlp_out"])
    assert [component.name for component in found.components] == ["mlp_out"]
    assert found.main.name == "mlp_out"


def test_steps_are_named():
    seen = []
    explain_layers(linearize(tiny.llama(), tiny.prompt(2), precision="double"), k=2, progress=seen.append)
    assert seen == ["maps from the embeddings", "each layer's own map", "words"]


def test_one_token_is_enough():
    found = explain_layers(linearize(tiny.llama(), tiny.prompt(1), precision="double"), k=2)
    assert found.main.joint_stable_rank == pytest.approx([row[0] for row in found.main.token_stable_rank])


def test_mistakes():
    lin, _ = built("llama")
    with pytest.raises(OptionError, match="ask for two or more"):
        explain_layers(lin, k=1)
    with pytest.raises(OptionError, match="k is 1 to"):
        explain_layers(lin, k=1000)
    with pytest.raises(OptionError, match="choose some of"):
        explain_layers(lin, components=["final"])
    with pytest.raises(PromptError, match="outside the prompt"):
        explain_layers(lin, position=9)
