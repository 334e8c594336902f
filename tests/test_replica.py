"""A linearization is that of its model as it was: what is done to the model, or beside it, reaches neither."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn

import loclin
import tiny
from loclin.errors import LoclinError, ModelError, NotExactError
from loclin.models import tiny as families
from loclin.models.replica import replicate
from loclin.network import record
from loclin.steering import Operator

IDS = tiny.prompt(6)
BUILDS = {"llama": lambda: tiny.llama(dtype=torch.float32), "gpt2": lambda: families.build("gpt2", dtype=torch.float32)}
QUESTIONS = {
    "map": lambda lin: lin.jacobian().dense(),
    "column": lambda lin: lin.jacobian().rmatvec(lin.value("final")[-1]),
    "shares": lambda lin: lin.attribute(5).shares,
    "heads": lambda lin: lin.attribute(5, by="head").shares,
    "logits elsewhere": lambda lin: lin.value("logits")[2],
    "bias": lambda lin: lin.jacobian().bias,
    "certificate": lambda lin: torch.tensor(lin.certify().reconstruction_error),
    "layers": lambda lin: lin.layer_spectra(k=1).S,
}


def state(model):
    return (
        [module.training for module in model.modules()],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        [sorted(vars(module)) for module in model.modules()],
    )


@pytest.fixture(params=BUILDS)
def model(request):
    return BUILDS[request.param]()


@pytest.fixture
def expected(model):
    return {name: ask(loclin.linearize(model, IDS)) for name, ask in QUESTIONS.items()}


def same(lin, expected):
    return all(torch.equal(ask(lin), expected[name]) for name, ask in QUESTIONS.items())


# what is switched on the model afterwards


@pytest.mark.sampled(1)
def test_a_hook_that_is_put_on_later_does_not_reach_it(model, expected):
    lin = loclin.linearize(model, IDS)
    part = model.get_decoder()
    handle = part.register_forward_hook(lambda *_: pytest.fail("the user's hook ran"))
    assert same(lin, expected)
    handle.remove()


@pytest.mark.slow
def test_a_hook_that_is_taken_off_later_stays_in_it(model):
    norm = next(module for module in model.modules() if "Norm" in type(module).__name__)
    handle = norm.register_forward_hook(lambda _m, _a, output: 2 * output)
    expected = {name: ask(loclin.linearize(model, IDS)) for name, ask in QUESTIONS.items()}
    lin = loclin.linearize(model, IDS)
    handle.remove()
    assert same(lin, expected)
    assert not same(loclin.linearize(model, IDS), expected)


@pytest.mark.slow
def test_training_mode_is_neither_met_nor_changed(model, expected):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    lin = loclin.linearize(model, IDS)
    model.train()
    before = state(model)
    assert same(lin, expected)
    assert same(loclin.linearize(model, IDS), expected)
    assert state(model) == before


@pytest.mark.slow
def test_what_is_first_asked_for_inside_steering_is_not_steered(model, expected):
    lin = loclin.linearize(model, IDS)
    operator = Operator.make(loclin.linearize(model, IDS), 1)
    before = state(model)
    with operator.apply(model, strength=2.0):
        assert same(lin, expected)
        assert lin.certify().passed
    assert state(model) == before
    assert same(lin, expected)


def test_linearizing_a_model_that_is_being_steered_is_refused(model):
    operator = Operator.make(loclin.linearize(model, IDS), 1)
    with operator.apply(model, strength=2.0), pytest.raises(ModelError, match="steered"):
        loclin.linearize(model, IDS)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of what peft asks transformers
def test_adapters_that_are_switched_later_do_not_reach_it():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=["v_proj", "down_proj"], init_lora_weights=False
    )
    adapted = peft.get_peft_model(BUILDS["llama"](), config)
    expected = {name: ask(loclin.linearize(adapted, IDS)) for name, ask in QUESTIONS.items()}
    lin = loclin.linearize(adapted, IDS)
    with adapted.disable_adapter():
        assert same(lin, expected)
        assert not same(loclin.linearize(adapted, IDS), expected)
    lin = loclin.linearize(adapted, IDS)
    adapted.merge_adapter()
    with pytest.raises(ModelError, match="changed"):
        lin.jacobian().dense()


# weights that change


def step(model, _name):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()


def scale_data(model, name):
    model.get_parameter(name).data.mul_(1.001)


def scale(model, name):
    with torch.no_grad():
        model.get_parameter(name).mul_(1.001)


def edit_a_row(model, name):
    with torch.no_grad():
        model.get_parameter(name)[0] += 1e-3


def load(model, name):
    model.load_state_dict({**model.state_dict(), name: 2 * model.get_parameter(name)})


def convert(model, _name):
    model.to(torch.float64)


CHANGES = {f.__name__: f for f in (step, scale_data, scale, edit_a_row, load, convert)}
WEIGHTS = {"llama": "model.layers.1.mlp.up_proj.weight", "gpt2": "transformer.h.1.mlp.c_fc.weight"}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("build", BUILDS)
def test_weights_that_changed_are_refused_by_name(build, change):
    model = BUILDS[build]()
    lin, fresh = loclin.linearize(model, IDS), loclin.linearize(model, IDS)
    kept = lin.jacobian().dense().clone()
    change(model, WEIGHTS[build])
    for ask in (QUESTIONS["map"], QUESTIONS["column"], QUESTIONS["shares"], QUESTIONS["heads"], QUESTIONS["layers"]):
        with pytest.raises(ModelError, match="weights have changed since this prompt was linearized"):
            ask(fresh)
    assert torch.equal(lin.jacobian().dense(), kept)  # what was computed before still holds for the model as it was
    assert loclin.linearize(model, IDS).certify().passed


@pytest.mark.slow
@pytest.mark.parametrize("build", BUILDS)
def test_a_weight_that_is_replaced_is_remembered(build):
    """The linearization keeps the old one, and goes on with it."""
    model = BUILDS[build]()
    expected = {name: ask(loclin.linearize(model, IDS)) for name, ask in QUESTIONS.items()}
    lin = loclin.linearize(model, IDS)
    owner, _, name = WEIGHTS[build].rpartition(".")
    setattr(model.get_submodule(owner), name, nn.Parameter(2 * model.get_parameter(WEIGHTS[build]).detach()))
    assert same(lin, expected)


def test_a_state_that_moves_between_calls_is_refused():
    class Counting(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.calls = inner, 0

        def forward(self, x):
            self.calls += 1
            return self.inner(x) * (1 + 0.01 * self.calls)

    model = BUILDS["llama"]()
    model.model.layers[1].mlp = Counting(model.model.layers[1].mlp)
    with pytest.raises(NotExactError, match="another output each time"):
        loclin.linearize(model, IDS)


# models that are random


class Noisy(nn.Module):
    def __init__(self, inner, noise):
        super().__init__()
        self.inner, self.noise = inner, noise

    def forward(self, *args, **kwargs):
        output = self.inner(*args, **kwargs)
        return (self.noise(output[0]), *output[1:]) if isinstance(output, tuple) else self.noise(output)


NOISES = {
    "dropout": lambda x: nn.functional.dropout(x, 0.2, training=True),
    "randn_like": lambda x: x + 0.01 * torch.randn_like(x),
    "bernoulli": lambda x: x * torch.bernoulli(torch.full_like(x, 0.9)),
    "scaled_dot_product_attention": lambda x: x + nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=0.3),
}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("precision", ["auto", "double"])
@pytest.mark.parametrize("part", ["mlp", "self_attn"])
def test_a_random_model_is_refused_and_the_operation_named(noise, precision, part):
    model = BUILDS["llama"]()
    layer = model.model.layers[1]
    setattr(layer, part, Noisy(getattr(layer, part), NOISES[noise]))
    with pytest.raises(NotExactError, match=rf"another output each time.*{noise} in model\.layers\.1\.{part}"):
        loclin.linearize(model, IDS, precision=precision)
    certificate = loclin.linearize(model, IDS, precision=precision, strict=False).certify()
    assert not certificate.passed
    assert any(noise == culprit.operation for culprit in certificate.culprits)


def test_attention_dropout_that_evaluation_mode_does_not_reach(monkeypatch):
    """The model's own attention with dropout in it: every other step of the way would hide it."""
    real = nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        nn.functional,
        "scaled_dot_product_attention",
        lambda q, k, v, **kwargs: real(q, k, v, **kwargs | {"dropout_p": 0.2}),
    )
    with pytest.raises(NotExactError, match="another output each time"):
        loclin.linearize(BUILDS["llama"](), IDS)


def test_the_caller_s_random_numbers_go_on_as_they_were(model):
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    lin = loclin.linearize(model, IDS)
    lin.certify()
    lin.jacobian().svd(2)
    assert torch.equal(torch.rand(3), expected)


# replicas themselves


def test_a_replica_shares_weights_and_nothing_else(model):
    model.train()
    model.some_list, model.bound = [1, model.get_decoder()], model.get_decoder().forward
    replica = replicate(model)
    assert all(a is b for a, b in zip(model.parameters(), replica.parameters(), strict=True))
    assert not any(a is b for a, b in zip(model.modules(), replica.modules(), strict=True))
    assert not any(module.training for module in replica.modules())
    assert replica.some_list == [1, replica.get_decoder()]
    assert replica.bound.__self__ is replica.get_decoder()
    replica.register_forward_hook(lambda *_: None)
    replica.some_list.append(2)
    assert len(model._forward_hooks) == 0
    assert len(model.some_list) == 2
    with torch.no_grad():
        assert torch.equal(replica(IDS).logits, copy.deepcopy(model).eval()(IDS).logits)


@pytest.mark.filterwarnings("ignore")
def test_a_replica_of_compiled_parts_runs_them_as_written():
    model = BUILDS["llama"]()
    expected = loclin.linearize(model, IDS).jacobian().dense()
    model.forward = torch.compile(model.forward, backend="eager")
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    model.model.layers[1].compile(backend="eager")
    assert torch.equal(loclin.linearize(model, IDS).jacobian().dense(), expected)


def test_a_model_that_rescales_its_weights_keeps_them():
    model = families.build("rwkv", dtype=torch.float32)
    before = [weight.clone() for weight in model.parameters()]
    loclin.linearize(model, IDS, strict=False).jacobian().dense()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


# threads


@pytest.mark.slow
@pytest.mark.long_for("llama")
@pytest.mark.parametrize(("build", "calls"), [("llama", 60), ("gpt2", 20)])
def test_threads_on_one_model_do_not_meet(build, calls):
    """Two threads with so many calls each, on one linearization and on new ones, beside the model's own forwards."""
    model = BUILDS[build]()
    shared = loclin.linearize(model, IDS)
    operator = Operator.make(shared, 1)
    questions = {
        "new": lambda: loclin.linearize(model, IDS, strict=False).jacobian().rmatvec(shared.value("final")[-1]),
        "shares": lambda: shared.attribute(5, by="head").shares,
        "column": lambda: shared.jacobian(target="mlp_out.1", position=3).rmatvec(shared.embeddings[0]),
        "logits": lambda: loclin.linearize(model, IDS, strict=False).value("logits")[1],
        "operator": lambda: operator.apply_to(shared.embeddings),
    }
    expected = {name: ask() for name, ask in questions.items()}
    with torch.no_grad():
        logits = model(IDS).logits
    wrong: list[str] = []
    done = threading.Event()

    def ask():
        for i in range(calls):
            name = list(questions)[i % len(questions)]
            try:
                if not torch.equal(questions[name](), expected[name]):
                    wrong.append(f"{name}: another answer")
            except Exception as error:  # noqa: BLE001 (whatever goes wrong is what is looked for)
                wrong.append(f"{name}: {error!r}")

    def forward():
        while not done.is_set():
            with torch.no_grad():
                if not torch.equal(model(IDS).logits, logits):
                    wrong.append("the model's own forward: other logits")

    asking = [threading.Thread(target=ask) for _ in range(2)]
    beside = threading.Thread(target=forward)
    for thread in (*asking, beside):
        thread.start()
    for thread in asking:
        thread.join()
    done.set()
    beside.join()
    assert wrong == []


def test_weights_that_change_as_the_logits_are_traced_are_said_to_have_changed(monkeypatch):
    """A step of another thread between the forward pass and the first look at its graph."""
    model, run = families.build("gpt2", dtype=torch.float32), record.run_to_logits

    def run_and_train(*args):
        found = run(*args)
        scale(model, "lm_head.weight")
        return found

    monkeypatch.setattr(record, "run_to_logits", run_and_train)
    with pytest.raises(ModelError, match="changed"):
        loclin.linearize(model, IDS)


def test_a_training_step_beside_is_one_that_was_alone():
    """Training in one thread, dropout and all, while another linearizes: the same weights come out."""
    model, alone = (families.build("gpt2", dtype=torch.float32) for _ in range(2))

    def train(model, seen):
        torch.manual_seed(0)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        for _ in range(20):
            model(IDS, labels=IDS).loss.backward()
            seen.append(model.training and all(module.training for module in model.modules()))
            optimizer.step()
            optimizer.zero_grad()

    for each in (model, alone):
        each.train()
        for module in each.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # the random numbers of a process are drawn by all its threads
    train(alone, [])
    seen: list[bool] = []
    thread = threading.Thread(target=train, args=(model, seen))
    refused, exact = [], 0
    thread.start()
    while thread.is_alive():
        try:
            lin = loclin.linearize(model, IDS, strict=False)
            exact += lin.certify().passed
        except LoclinError as error:
            refused.append(str(error))
    thread.join()
    assert all(seen)
    assert len(seen) == 20
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), alone.parameters(), strict=True))
    assert all("changed" in text or "again" in text for text in refused), refused
