"""Moved inputs on both packaged models: bit for bit where nothing moved, and shares that say something."""

from __future__ import annotations

import pytest
import torch

import loclin
from loclin.analyses.faithfulness.deletion import Removal
from loclin.analyses.faithfulness.methods import frozen
from loclin.analyses.faithfulness.study import mean_embedding
from loclin.analyses.faithfulness.summary import rank_correlations
from loclin.analyses.nearby import Nearby

pytestmark = pytest.mark.real


@pytest.fixture(scope="module", params=["smollm2-135m", "gemma-3-270m"])
def model(request):
    return loclin.load(request.param)


def test_at_the_prompt_it_is_the_model_bit_for_bit(model):
    lin = loclin.linearize(model, "The bridge out of Marin is the", bos=True)
    for found in (Nearby(lin).embeddings(lin.embeddings[None]), Nearby(lin).tokens(lin.input_ids)):
        assert torch.equal(found.logits[0], lin.trace.stock_logits)
        assert torch.equal(found.final[0], lin.trace.stock_final[0, -1])


def test_near_the_prompt_only_the_derivative_holds(model):
    found = loclin.validity(loclin.linearize(model, "The Golden Gate", bos=True), sizes=[0.001, 0.01], draws=2, swaps=0)
    near, further = found.curve("noise")
    assert near.errors["frozen"].final < 0.01
    assert near.errors["ordinary"].final < 0.1 * near.errors["frozen"].final
    assert near.errors["ordinary"].final < 0.1 * further.errors["ordinary"].final
    assert near.errors["frozen"].top == 1


@pytest.mark.long_for("gemma-3-270m")
def test_shares_agree_with_what_tokens_do(model):
    """On a few prompts; `loclin faithfulness` does it properly."""
    found = []
    for prompt in ("The violin was so old that nobody dared to", "The town of Elmford has a bridge. Everyone in"):
        lin = loclin.linearize(model, prompt, bos=True)
        effects = Removal(Nearby(lin), lin.input_ids, lin.next_token_ids(1)[0][0]).single()
        shares = frozen(lin, mean_embedding(model))["frozen/half/centred/zero"]
        words = [i for i in range(len(lin.tokens)) if i not in lin.sinks]
        found += rank_correlations(shares[words].tolist(), effects[words].tolist())
    assert sum(found) / len(found) > 0.2
