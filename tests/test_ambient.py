"""A result has the same bits whatever torch is set to where it is asked for, and nothing stays behind."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass

import pytest
import torch

import loclin
import tiny
from loclin.analyses.decode import Decoder
from loclin.analyses.layers import explain_layers
from loclin.analyses.logit_lens import logit_lens
from loclin.common.surroundings import plain_torch
from loclin.errors import ModelError, OptionError
from loclin.models import tiny as families
from loclin.steering import Operator


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


STATES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "float64 by default": lambda: default_dtype(torch.float64),
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "on meta": lambda: torch.device("meta"),
    "meta by default": lambda: default_device("meta"),
}
QUESTIONS = {
    "certificate": lambda lin: lin.certify(),
    "dense map": lambda lin: lin.jacobian().dense(),
    "logits": lambda lin: lin.jacobian(target="logits").dense(),
    "rows": lambda lin: [rows for _, rows in lin.jacobian(target="resid_post.1").rows(chunk=5)],
    "products": lambda lin: [lin.jacobian().matvec(lin.embeddings), lin.jacobian().rmatvec(lin.value("final")[-1])],
    "bias": lambda lin: lin.jacobian().bias,
    "biases": lambda lin: lin.jacobian().bias_by_source(),
    "rebuilt": lambda lin: lin.jacobian().reconstruct(),
    "triples": lambda lin: [getattr(lin.jacobian().svd(3), name) for name in ("U", "S", "Vh", "lower", "upper")],
    "joint triples by products": lambda lin: lin.jacobian().svd(2, joint=True, method="matrix_free").S,
    "spectra": lambda lin: [lin.jacobian().singular_values(), lin.jacobian().stable_rank()],
    "norms": lambda lin: lin.jacobian().norms().frobenius,
    "values": lambda lin: [lin.value(point) for point in ("embed", "resid_mid.1", "final", "logits")],
    "other positions": lambda lin: lin.next_tokens(3, position=2),
    "ordinary": lambda lin: lin.ordinary_reconstruction(),
    "layers": lambda lin: lin.layer_spectra(k=2).S,
    **{
        f"shares by {level}": lambda lin, level=level: lin.attribute(5, by=level).shares
        for level in ("token", "layer", "head", "neuron", "bias", "token×layer")
    },
    "head": lambda lin: lin.head(1, 2).to_dict(),
    "attention score": lambda lin: lin.attention_score("L1H2").to_dict(),
    "span": lambda lin: lin.attribute([5, 6, 7], by="line").shares,
    "prompts": lambda lin: lin.compare_prompts(lin, 5).to_dict(),
    "interventions": lambda lin: lin.intervene(["L1H2", "L0N3", "attn_out.0", "mlp_out.1", "T1"]).to_dict(),
    "patching": lambda lin: [
        lin.patch(loclin.linearize(lin.model, lin.input_ids.flip(1)), 5, by=by).changes for by in ("layer", "head")
    ],
    "path": lambda lin: lin.path(["L1H2"], token=0).to_dict(),
    "explanation": lambda lin: loclin.explain(lin, k=2),
    "exploration": lambda lin: lin.explore(count=9).to_dict(),
    "layers in words": lambda lin: explain_layers(lin, k=2),
    "similarity": lambda lin: lin.similarity(),
    "logit lens": lambda lin: logit_lens(lin, 5),
    "generation": lambda lin: loclin.generate(lin, 2, k=2),
    "words": lambda lin: Decoder(lin.model).reads(lin.embeddings, 3),
    "operator": lambda lin: Operator.make(lin, 1).apply_to(lin.embeddings),
}


def plain(answer):
    """An answer as something that can be compared bit by bit."""
    if isinstance(answer, torch.Tensor):
        return answer.tolist()
    if is_dataclass(answer):
        return plain(asdict(answer))
    if isinstance(answer, dict):
        return {key: plain(value) for key, value in answer.items() if key != "date"}
    return [plain(item) for item in answer] if isinstance(answer, list | tuple) else answer


def surroundings():
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch.get_default_device(),
    )


@pytest.fixture(scope="module")
def model():
    """One with biases and without explicit products: every door is used."""
    return loclin.wrap(families.build("gpt2", dtype=torch.float32))


@pytest.fixture(scope="module")
def llama():
    return loclin.wrap(tiny.llama(dtype=torch.float32))


@pytest.fixture(scope="module")
def answers(model):
    return {name: plain(ask(loclin.linearize(model, IDS, strict=False))) for name, ask in QUESTIONS.items()}


def ask_all(model):
    """All questions to one linearization: some answers are made of what others left."""
    lin = loclin.linearize(model, IDS.clone())
    return {name: plain(ask(lin)) for name, ask in QUESTIONS.items()}


@pytest.fixture(scope="module")
def all_answers(llama):
    return ask_all(llama)


IDS = tiny.prompt(6)


@pytest.mark.slow
@pytest.mark.parametrize("state", ["inference_mode", "autocast", "float64 by default", "on meta"])
@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_asked_in_another_state_has_the_same_answer(question, state, model, answers):
    lin = loclin.linearize(model, IDS, strict=False)  # its certificate is one of the questions
    with STATES[state]():
        inside = surroundings()
        found = plain(QUESTIONS[question](lin))
        assert surroundings() == inside
    assert found == answers[question]
    assert plain(QUESTIONS[question](lin)) == found  # what was kept is what was asked for


@pytest.mark.slow
@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_all_of_it_in_another_state(state, llama, all_answers):
    with state():
        found = ask_all(llama)
    assert found == all_answers


def test_token_ids_and_vectors_made_in_inference_mode(llama):
    expected = loclin.linearize(llama, IDS).jacobian()
    with torch.inference_mode():
        ids, u = IDS.clone(), expected.value.clone()
    lin = loclin.linearize(llama, ids)
    assert torch.equal(lin.jacobian().dense(), expected.dense())
    assert torch.equal(lin.jacobian().rmatvec(u), expected.rmatvec(expected.value))


def test_a_model_made_in_inference_mode_is_refused_by_name():
    with torch.inference_mode():
        model = tiny.llama()
    with pytest.raises(ModelError, match="inference_mode"):
        loclin.wrap(model)


def test_inside_a_transformed_function_it_is_refused(llama):
    with pytest.raises(OptionError, match="vmap"):
        torch.vmap(lambda ids: loclin.linearize(llama, ids[None]).embeddings)(IDS)


def test_switches_of_the_process_are_restored_when_threads_overlap():
    """The last one out restores what the first one found."""
    barrier = threading.Barrier(2)

    def first_in():
        with plain_torch():
            barrier.wait()  # both are inside
            barrier.wait()  # the other one has left

    thread = threading.Thread(target=first_in)
    with default_dtype(torch.float64):
        thread.start()
        with plain_torch():
            barrier.wait()
            assert torch.get_default_dtype() == torch.float32
        assert torch.get_default_dtype() == torch.float32  # the other one still computes
        barrier.wait()
        thread.join()
        assert torch.get_default_dtype() == torch.float64


def test_an_error_inside_restores_them_too():
    with default_dtype(torch.float64), torch.no_grad():
        with pytest.raises(KeyError), plain_torch():
            raise KeyError
        assert torch.get_default_dtype() == torch.float64
        assert not torch.is_grad_enabled()
