"""Near the prompt the frozen map is right in value and the ordinary one in slope; a whole swap is another prompt."""

from __future__ import annotations

import io
import json
import math

import pytest
import torch
from rich.console import Console

import oracle
import tiny
from loclin.analyses.validity import FRACTIONS, validity
from loclin.errors import OptionError, PromptError
from loclin.linearization import linearize
from loclin.results import display

BUILDS = {"llama": tiny.llama, "llama-biases": lambda: tiny.llama(biases=True), "gemma3": tiny.gemma3}


@pytest.fixture(params=BUILDS.values(), ids=BUILDS)
def lin(request):
    return linearize(request.param(), tiny.prompt(6), precision="double")


def test_errors_go_to_zero_with_the_move(lin):
    """In first order for the frozen map and the constant, in second for the derivative.

    Not much smaller: the models' own norms compute in float32, whatever their dtype.
    """
    found = validity(lin, sizes=[1e-4, 1e-3, 1e-2], draws=3, swaps=0)
    small, middle, large = found.curve("noise")
    assert small.errors["frozen"].final < 1e-2
    for name, order in (("frozen", 1), ("constant", 1), ("ordinary", 2)):
        grown = math.log10(large.errors[name].final / middle.errors[name].final)
        assert grown == pytest.approx(order, abs=0.2)
    assert small.errors["constant"].missed == pytest.approx(1, abs=1e-3)
    assert small.errors["frozen"].missed == pytest.approx(large.errors["frozen"].missed, rel=0.1)
    assert small.errors["ordinary"].missed < 1e-2
    assert all(error.top == 1 and error.kl < 1e-5 for error in small.errors.values())
    assert small.moved == pytest.approx(1e-4)


def test_a_swap_is_the_model_with_that_token():
    """Every number again, from the dense map and the model's own forward pass, and not by rays."""
    lin = linearize(tiny.llama(attn="eager"), tiny.prompt(6), precision="double")
    found = validity(lin, draws=0, swaps=1)
    hf, J = lin.model.hf, lin.jacobian().dense()
    dense, x, y = oracle.jacobian(hf, lin.input_ids, -1)
    assert torch.allclose(dense, J, atol=1e-10)
    assert [ray.kind for ray in found.rays] == ["near", "random"] * sum(i not in lin.sinks for i in range(6))
    for ray in found.rays:
        ids = lin.input_ids.clone()
        ids[0, ray.position] = int(ray.token)
        moved = hf.get_input_embeddings()(ids)[0].detach()
        with torch.no_grad():
            true = hf.get_decoder()(input_ids=ids).last_hidden_state[0, -1]
            logits = hf(input_ids=ids).logits[0, -1]
        predicted = torch.einsum("oti,ti->o", dense, moved)
        error = ray.steps[-1].errors["frozen"]
        assert ray.steps[-1].size == FRACTIONS[-1] == 1
        assert error.final == pytest.approx(((predicted - true).norm() / true.norm()).item(), rel=1e-6)
        assert error.missed == pytest.approx(((predicted - true).norm() / (true - y).norm()).item(), rel=1e-6)
        said = torch.log_softmax(hf.lm_head.weight @ predicted, -1).detach()
        p = torch.log_softmax(logits, -1)
        assert error.kl == pytest.approx((p.exp() * (p - said)).sum().item(), rel=1e-5)
        assert error.top == float(said.argmax() == p.argmax())


def test_neighbours_are_the_nearest_embeddings():
    lin = linearize(tiny.llama(), tiny.prompt(6))
    found = validity(lin, draws=0, swaps=3)
    table = torch.nn.functional.normalize(lin.model.hf.get_input_embeddings().weight.detach(), dim=-1)
    for i in {ray.position for ray in found.rays}:
        cosines = table @ table[lin.input_ids[0, i]]
        expected = cosines.argsort(descending=True)[1:4].tolist()
        assert [int(ray.token) for ray in found.rays if ray.position == i and ray.kind == "near"] == expected


def test_json_and_an_earlier_position(lin):
    found = validity(lin, position=2, sizes=[0.1], draws=1, swaps=1)
    assert {ray.position for ray in found.rays} <= {None, 0, 1, 2}
    read = json.loads(found.to_json())
    assert read["curves"]["noise"][0]["errors"]["frozen"]["final"] == found.rays[0].steps[0].errors["frozen"].final
    assert read["provenance"]["position"] == 2


@pytest.mark.slow
def test_the_same_seed_is_the_same_study(lin):
    one, other = (validity(lin, sizes=[0.1], draws=1, swaps=1, seed=seed) for seed in (5, 5))
    assert one.rays == other.rays
    assert one.rays != validity(lin, sizes=[0.1], draws=1, swaps=1, seed=6).rays


def test_nothing_to_move_by_is_refused(lin):
    with pytest.raises(OptionError, match="at least one"):
        validity(lin, draws=0, swaps=0)
    with pytest.raises(OptionError, match="above 0"):
        validity(lin, sizes=[0.0])
    with pytest.raises(PromptError, match="outside the prompt"):
        validity(lin, position=9)


def test_the_page_and_the_terminal_show_the_curves():
    pytest.importorskip("plotly")
    found = validity(linearize(tiny.llama(), tiny.prompt(5)), sizes=[0.01, 0.1], draws=2, swaps=1)
    page = display.page(found)
    assert page.count('class="figure"') == 6
    assert page.count("<tr>") == 3 * 1 + 2 + 2 * len(FRACTIONS) + 1 + sum(
        ray.position is not None for ray in found.rays
    )
    assert f"{found.curve('noise')[1].errors['ordinary'].final:.2g}"[:3] in page
    console = Console(width=200, record=True, file=io.StringIO())
    display.show(found, console)
    shown = console.export_text()
    assert "Random directions" in shown
    assert "Towards near tokens" in shown
    noise = validity(linearize(tiny.llama(), tiny.prompt(5)), sizes=[0.01], draws=1, swaps=0)
    assert "Every swap" not in display.page(noise)


def test_one_token_that_is_all_there_is():
    found = validity(linearize(tiny.gemma3(), tiny.prompt(1)), sizes=[0.1], draws=1, swaps=1)
    assert [ray.kind for ray in found.rays] == ["noise", "near", "random"]
