"""Disrupt and recover, and every published method in it, against slow forms of the same written out by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tiny
from loclin.analyses.faithfulness import disruption as study_module
from loclin.analyses.faithfulness import rivals, scores
from loclin.analyses.faithfulness.disruption import Disruption, disruption
from loclin.analyses.faithfulness.items import Item, load_items
from loclin.analyses.faithfulness.zeroing import Zeroing
from loclin.analyses.nearby import Nearby
from loclin.errors import ModelError, OptionError, OutputError
from loclin.linearization import linearize
from loclin.models import wrap
from loclin.report.disruption import disruption_markdown, name_method

IDS = tiny.prompt(6)
TARGET = 9
FAMILIES = {"llama": tiny.llama, "gemma3": tiny.gemma3}
EXACT = 1e-6
"""Norms and rotations of these families are in float32, whatever the model's dtype."""


def with_words(hf):
    words = ["<s>", "<unk>", *(f"w{i}" for i in range(tiny.VOCABULARY - 2))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return wrap(hf, PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>"))


@pytest.fixture(scope="module")
def model():
    return with_words(tiny.llama())


@pytest.fixture(params=FAMILIES)
def hf(request):
    return FAMILIES[request.param]()


def embed(hf):
    """What enters layer 0 `[T, d]`."""
    return linearize(hf, IDS).embeddings


def run(hf, x):
    """The last logits for vectors at the input of layer 0."""
    layer, kept = hf.model.layers[0], {}

    def enter(_module, args, kwargs):
        if "hidden_states" in kwargs:
            return args, kwargs | {"hidden_states": x[None]}
        return (x[None], *args[1:]), kwargs

    handle = layer.register_forward_pre_hook(enter, with_kwargs=True)
    try:
        kept["logits"] = hf(IDS).logits[0, -1]
    finally:
        handle.remove()
    return kept["logits"]


def close(found, expected, bound=EXACT):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    return (found.double() - expected).abs().max() <= bound * expected.abs().max()


# the protocol


def test_areas_are_those_of_runs_one_by_one(hf):
    lin, x, positions = linearize(hf, IDS), embed(hf), [1, 2, 4, 5]
    given = [9.0, 0.3, -1.0, 7.0, 2.0, 0.3]
    order = [4, 1, 5, 2]  # a tie goes to the earlier token; positions 0 and 3 are not the context

    def probability(gone):
        vectors = x.clone()
        vectors[gone] = 0
        return run(hf, vectors).softmax(-1)[TARGET].item()

    whole = probability([])
    steps = [math.ceil(p * 4 / 10) for p in range(1, 11)]
    expected = [
        sum(100 * (whole - probability(part(n))) / whole for n in steps) / 10
        for part in (lambda n: order[:n], lambda n: order[n:])
    ]
    zeroing = Zeroing(Nearby(lin), x, TARGET, positions)
    assert zeroing.areas(given) == pytest.approx(expected, rel=EXACT)
    falls = zeroing.each()
    assert falls[[0, 3]].tolist() == [0, 0]
    assert falls[2].item() == pytest.approx(whole - probability([2]), rel=1e-5)


def test_a_set_is_run_once(hf):
    lin, runs = linearize(hf, IDS), []
    nearby = Nearby(lin)
    inner = nearby.embeddings
    nearby.embeddings = lambda inputs: runs.append(len(inputs)) or inner(inputs)
    zeroing = Zeroing(nearby, lin.embeddings, TARGET, [1, 2, 3])
    zeroing.prepare([[0.0, 1.0, 2.0, 3.0, 4.0, 5.0], [0.0, 3.0, 2.0, 1.0, 4.0, 5.0]])
    assert sum(runs) == 6  # of the 8 subsets of three; {2} and {1, 3} are on neither way
    zeroing.areas([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    assert len(runs) == 1


def test_steps_crowd_at_both_ends_of_a_long_context(hf):
    steps = Zeroing(Nearby(linearize(hf, IDS)), embed(hf), TARGET, range(65)).steps
    assert len(steps) == 11
    assert steps[0] == pytest.approx(1 / (1 + math.exp(6)))
    assert steps[5] == pytest.approx(0.5)


# the methods


def test_attention(hf):
    hf.set_attn_implementation("eager")
    with torch.no_grad():
        patterns = [p[0].double().mean(0) for p in hf(IDS, output_attentions=True).attentions]
    rolled = torch.eye(6, dtype=torch.float64)
    for pattern in patterns:
        rolled = (0.5 * pattern + 0.5 * torch.eye(6, dtype=torch.float64)) @ rolled
    hf.set_attn_implementation("sdpa")
    found = rivals.attention(linearize(hf, IDS))
    assert close(found["attention, last layer"], patterns[-1][-1])
    assert close(found["attention, mean"], torch.stack(patterns).mean(0)[-1])
    assert close(found["attention rollout"], rolled[-1])


def test_gradients(hf):
    x = embed(hf)

    def slope(scale):
        leaf = (scale * x).requires_grad_()
        return torch.autograd.grad(run(hf, leaf)[TARGET], leaf)[0]

    lin = linearize(hf, IDS)
    found = rivals.gradients(lin, Nearby(lin), TARGET)
    plain = slope(1.0)
    path = sum(slope((i + 0.5) / rivals.STEPS) for i in range(rivals.STEPS)) / rivals.STEPS
    assert close(found["gradient"], plain.sum(-1))
    assert close(found["gradient norm"], plain.norm(dim=-1))
    assert close(found["gradient × input"], (plain * x).sum(-1))
    assert close(found["integrated gradients"], (path * x).sum(-1))


def frozen_layer(hf, index):
    """A layer of a Llama or Gemma 3 with its norms and attention held: its parts as functions of vectors `[T, d]`."""
    layer, seen = hf.model.layers[index], {}
    norms = [name for name, _ in layer.named_children() if "norm" in name]
    modules = [*norms, "self_attn.v_proj", "mlp.gate_proj", "mlp.down_proj"]
    handles = [
        layer.get_submodule(name).register_forward_hook(
            lambda _m, args, output, name=name: seen.__setitem__(name, (args[0][0], output[0]))
        )
        for name in modules
    ]
    hf.set_attn_implementation("eager")
    with torch.no_grad():
        pattern = hf(IDS, output_attentions=True).attentions[index][0]
    hf.set_attn_implementation("sdpa")
    for handle in handles:
        handle.remove()

    def norm(name, v):
        module, (before, _) = layer.get_submodule(name), seen[name]
        gain = module.weight + 1 if "Gemma" in type(module).__name__ else module.weight
        eps = getattr(module, "eps", None) or module.variance_epsilon
        return v * gain * (before.square().mean(-1, keepdim=True) + eps).rsqrt()

    def attend(v):
        values = layer.self_attn.v_proj(norm("input_layernorm", v)).view(len(v), -1, layer.self_attn.head_dim)
        values = values.transpose(0, 1).repeat_interleave(len(pattern) // values.shape[1], 0)
        out = layer.self_attn.o_proj((pattern @ values).transpose(0, 1).flatten(1))
        return norm("post_attention_layernorm", out) if "pre_feedforward_layernorm" in norms else out

    before_mlp = "pre_feedforward_layernorm" if "pre_feedforward_layernorm" in norms else "post_attention_layernorm"

    def open_gate(v):
        return layer.mlp.gate_proj(norm(before_mlp, v))

    def write(inner):
        out = layer.mlp.down_proj(inner)
        return norm("post_feedforward_layernorm", out) if "pre_feedforward_layernorm" in norms else out

    return attend, open_gate, write, seen["mlp.down_proj"][0], seen["input_layernorm"][0]


def one_token(x, i):
    alone = torch.zeros_like(x)
    alone[i] = x[i]
    return alone


def test_information_flow(hf):
    flow = torch.eye(6, dtype=torch.float64)
    for index in range(3):
        attend, _, _, _, x = frozen_layer(hf, index)
        parts = [attend(one_token(x, j)) for j in range(6)]
        weights = torch.zeros(6, 6, dtype=torch.float64)
        for i in range(6):
            y = x[i] + sum(part[i] for part in parts)
            for z, j in [(x[i], i), *((parts[j][i], j) for j in range(6))]:
                weights[i, j] += max(0.0, (y.abs().sum() - (y - z).abs().sum()).item())
        flow = weights / weights.sum(1, keepdim=True) @ flow
    assert close(rivals.information_flow(linearize(hf, IDS))["information flow"], flow[-1])


def test_decomposed_pass(hf):
    x = embed(hf)
    streams = [one_token(x, i) for i in range(6)]
    for index in range(3):
        attend, open_gate, write, inner, _ = frozen_layer(hf, index)
        streams = [stream + attend(stream) for stream in streams]
        weights = torch.stack([open_gate(stream) for stream in streams]).softmax(0)
        streams = [stream + write(weight * inner) for stream, weight in zip(streams, weights, strict=True)]
    slope = (
        linearize(hf, IDS)
        .jacobian("resid_post.2", "logits")
        .rmatvec(torch.eye(tiny.VOCABULARY, dtype=torch.float64)[TARGET])[-1]
    )
    expected = torch.stack([stream[-1] @ slope for stream in streams])
    found = rivals.decomposed_pass(linearize(hf, IDS), TARGET)["DePass"]
    assert close(found, expected, 1e-5)
    logit = hf(IDS).logits[0, -1, TARGET]
    assert abs(found.sum() - logit) < 1e-5 * found.abs().sum()


def test_a_method_that_a_family_lacks_is_left_out():
    from loclin.models import tiny as families

    lin = linearize(families.build("gpt2"), IDS)  # no gate
    assert rivals.decomposed_pass(lin, TARGET) == {}
    assert set(rivals.attention(lin)) == {"attention, last layer", "attention, mean", "attention rollout"}
    mamba = linearize(families.build("mamba"), IDS)
    assert rivals.attention(mamba) == {}
    assert rivals.information_flow(mamba) == {}


def test_attention_step_by_step_is_not_shared():
    lin = linearize(tiny.llama(attn="eager"), IDS)
    nearby = Nearby(lin)
    found = scores.score_each(lin, nearby, Zeroing(nearby, lin.embeddings, TARGET, range(6)), TARGET, seed=0)
    assert "frozen/half/centred" in found
    assert not [name for name in found if name.startswith("shared/")]


def test_shares_are_those_of_attribute(hf):
    lin = linearize(hf, IDS)
    nearby = Nearby(lin)
    found = scores.score_each(lin, nearby, Zeroing(nearby, lin.embeddings, TARGET, range(6)), TARGET, seed=0)
    for gate in ("activation", "up", "half"):
        own = linearize(hf, IDS, gate=gate)
        assert close(found[f"frozen/{gate}/logit"], own.attribute(TARGET).shares)
    half = linearize(hf, IDS, gate="half")
    assert close(found["shared/¼ ¼ ½/logit"], half.attribute(TARGET, attention="shared").shares)
    again = scores.score_each(lin, nearby, Zeroing(nearby, lin.embeddings, TARGET, range(6)), TARGET, seed=0)
    assert torch.equal(found["random"], again["random"])


# items


def test_items_of_every_form(model, tmp_path):
    path = tmp_path / "items.json"
    given = [
        {"known_id": 7, "prompt": "w1 w2", "attribute": "w3"},
        {"prompt": "w4 w5 w6", "answer": " w7"},
        {"id": "a", "context": "w1 w2 w3", "question": "w4", "answer": "w2"},
    ]
    path.write_text(json.dumps(given))
    items, digest = load_items(path)
    assert [item.name for item in items] == ["7", "1", "a"]
    assert len(digest) == 64
    ids = model.encode(items[0].prompt, bos=True)[0].tolist()
    assert items[0].positions(model, ids) == [1, 2]  # without the beginning token
    assert items[0].answer_id(model, ids) == 5  # w3
    asked = model.encode(items[2].prompt, bos=False)[0].tolist()
    assert [model.decode_each(asked)[i].strip() for i in items[2].positions(model, asked)] == ["w1", "w2", "w3"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "not JSON"),
        ("{}", "no list"),
        ("[]", "no list"),
        ('[{"prompt": "w1"}]', "item 0"),
        ('[{"prompt": "w1", "answer": "w2"}, 3]', "item 1"),
        ('[{"prompt": "", "answer": "w2"}]', "item 0"),
    ],
)
def test_files_that_are_no_items(tmp_path, text, why):
    path = tmp_path / "items.json"
    path.write_text(text)
    with pytest.raises(OptionError, match=why):
        load_items(path)
    with pytest.raises(OptionError, match="cannot read"):
        load_items(tmp_path / "none.json")


# the study


@pytest.fixture(scope="module")
def items(model):
    """Prompts with what the model predicts as their answers, but for one."""
    texts = ["w3 w4 w5 w6", "w9 w8 w7 w6 w5", "w1 w2 w1 w2"]
    found = []
    for text in texts:
        ids = model.encode(text, bos=True)
        answer = int(model.hf(ids).logits[0, -1].argmax())
        found.append(Item(text, text, model.decode([answer]), (0, len(text))))
    return [Item("wrong", "w3 w4", "w60" if found[0].answer != "w60" else "w59", (0, 5)), *found]


def test_a_study_goes_on_where_it_stopped(model, items, tmp_path, monkeypatch):
    path, told, measured = tmp_path / "study.json", [], []
    inner = study_module.measure

    def measure(model, item, **options):
        measured.append(item.name)
        return inner(model, item, **options)

    monkeypatch.setattr(study_module, "measure", measure)
    options = {"bos": True, "path": path, "source": "x", "progress": told.append}
    first = disruption(model, items, count=2, **options)
    assert [item.known for item in first.items] == [False, True, True]
    assert not first.items[0].areas
    whole = disruption(model, items, **options)
    assert measured == ["wrong", *(item.name for item in items[1:])]
    assert "going on" in told[-1]
    assert len(whole.known) == 3
    assert Disruption.load(path).items == whole.items
    disruption(model, items, **options | {"source": "y"})
    assert "starting over" in told[-1]
    rows = whole.table()
    assert len(rows["area"]) == 3 * len(whole.methods)
    exact = [missed for name, missed in zip(rows["method"], rows["missed"], strict=True) if name.startswith("frozen/")]
    assert max(exact) < 1e-4
    page = disruption_markdown(whole)
    for name in whole.methods:
        assert name_method(name) in page
    path.write_text("{}")
    with pytest.raises(OutputError):
        disruption(model, items, **options)


def test_a_model_that_knows_nothing_is_said_to(model, items):
    with pytest.raises(ModelError, match="answers none of 1 items"):
        disruption(model, items[:1], bos=True, progress=False)
