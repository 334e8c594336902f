"""Models that are not plain float modules on one device: each works exactly, or is refused with one reason."""

from __future__ import annotations

import copy
from importlib.util import find_spec

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaPreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

import loclin
import tiny
from loclin.errors import ModelError
from loclin.linearization import linearize

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch.compile, and of the optional libraries

IDS = tiny.prompt(6)


def dense(model):
    """J of a model that passes its certificate."""
    lin = linearize(model, IDS)
    assert lin.certify().passed
    return lin.jacobian().dense()


@pytest.fixture(scope="module")
def expected():
    return dense(tiny.llama())


# what the model's own switches do


@pytest.mark.slow
def test_training_mode_is_put_back():
    model = tiny.llama()
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
        layer.mlp = nn.Sequential(layer.mlp, nn.Dropout(0.5))
    model.train()
    J = dense(model)
    assert all(module.training for module in model.modules())
    assert torch.equal(J, dense(model))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant, expected):
    model = tiny.llama().train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert torch.equal(dense(model), expected)
    assert model.is_gradient_checkpointing


@pytest.mark.parametrize("name", ["flex_attention", "flash_attention_2", "kernels-community/flash-attn"])
def test_attention_in_one_kernel_is_refused(name):
    model = tiny.llama()
    model.config._attn_implementation_internal = name
    with pytest.raises(ModelError, match=rf"computes its attention with {name}.*set_attn_implementation\('sdpa'\)"):
        linearize(model, IDS)
    model.set_attn_implementation("sdpa")
    assert linearize(model, IDS).certify().passed


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="it is there")
def test_flash_attention_that_is_not_there(tmp_path):
    tiny.llama().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="FlashAttention2"):
        loclin.load(tmp_path, attn_implementation="flash_attention_2")


def test_kernels_from_the_hub_are_refused(tmp_path):
    model = tiny.llama()
    model._use_kernels = True
    with pytest.raises(ModelError, match="kernels from the hub"):
        loclin.wrap(model)
    with pytest.raises(ModelError, match="kernels from the hub"):
        loclin.load(tmp_path, use_kernels=True)


def test_weights_without_values_are_refused():
    with pytest.raises(ModelError, match=r"meta device\): model\.embed_tokens\.weight"):
        linearize(tiny.llama().to("meta"), IDS)


def test_tied_and_resized_embeddings():
    model = tiny.llama(tied=True)
    J = dense(model)
    model.resize_token_embeddings(tiny.VOCABULARY + 9)
    assert torch.equal(dense(model), J)
    assert linearize(model, IDS).jacobian(target="logits").shape[0] == tiny.VOCABULARY + 9
    assert linearize(model, torch.tensor([[tiny.VOCABULARY + 8, 3]])).certify().passed


# what is put around a model


@pytest.mark.slow
@pytest.mark.parametrize("how", ["module", "in place", "forward", "layers"])
def test_compiled(how, expected):
    model = given = tiny.llama()
    if how == "module":
        given = torch.compile(model, backend="eager")
    elif how == "in place":
        model.compile(backend="eager")
    elif how == "forward":
        model.forward = torch.compile(model.forward, backend="eager")
    else:
        for layer in model.model.layers:
            layer.compile(backend="eager")
    with torch.no_grad():
        before = given(IDS).logits
    state = (type(given), dict(vars(model)), [module._compiled_call_impl for module in model.modules()])
    assert torch.equal(dense(given), expected)
    assert (type(given), dict(vars(model)), [module._compiled_call_impl for module in model.modules()]) == state
    with torch.no_grad():
        assert torch.equal(given(IDS).logits, before)


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


def lora(peft, **changes):
    return peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False, **changes)


@pytest.mark.slow
def test_lora_equals_the_merged_model(peft):
    torch.manual_seed(0)
    adapted = peft.get_peft_model(tiny.llama(), lora(peft, lora_dropout=0.3)).train()
    J = dense(adapted)
    merged = dense(copy.deepcopy(adapted).merge_and_unload())
    assert (J - merged).norm() < 1e-6 * merged.norm()
    with adapted.disable_adapter():
        assert (dense(adapted) - J).norm() > 1e-3 * J.norm()
    assert torch.equal(dense(torch.compile(adapted, backend="eager")), J)


@pytest.mark.slow
def test_other_adapters(peft, expected):
    torch.manual_seed(0)
    model = tiny.llama()
    model.add_adapter(lora(peft))
    assert (dense(model) - expected).norm() > 1e-3 * expected.norm()
    model.disable_adapters()
    assert (dense(model) - expected).norm() < 1e-6 * expected.norm()
    dora = peft.get_peft_model(tiny.llama(), lora(peft, use_dora=True))
    assert linearize(dora, IDS).certify().passed


@pytest.mark.parametrize("kind", ["PrefixTuningConfig", "PromptTuningConfig"])
def test_learned_prompts_are_refused(peft, kind):
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ModelError, match=r"adapter 'default' \(P\w+_TUNING\) acts in front of the model's layers"):
        linearize(peft.get_peft_model(tiny.llama(), config), IDS)


# where the weights are


@pytest.mark.parametrize("where", ["cpu", "disk", "dispatched"])
def test_offloaded(where, expected, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = tiny.llama()
    if where == "cpu":
        accelerate.cpu_offload(model)
    elif where == "disk":
        accelerate.disk_offload(model, str(tmp_path))
    else:
        names = ["embed_tokens", "rotary_emb", "norm", "layers.0", "layers.1", "layers.2"]
        places = {f"model.{name}": "disk" if "layers" in name else "cpu" for name in names} | {"lm_head": "disk"}
        accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path))
    assert any(parameter.is_meta for parameter in model.parameters())
    J = dense(model)
    assert (J - expected).norm() < 1e-12 * expected.norm()
    assert any(parameter.is_meta for parameter in model.parameters())


def test_constants_keep_their_names_when_offloaded():
    accelerate = pytest.importorskip("accelerate")
    here, there = tiny.llama(biases=True), tiny.llama(biases=True)
    accelerate.cpu_offload(there)
    a, b = (linearize(model, IDS).chain.layers[1].constants() for model in (here, there))
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[name], b[name]) for name in a)
    assert "model.layers.1.self_attn.v_proj.bias" in a


# code that transformers does not know


class Own(LlamaPreTrainedModel):
    """A model with its own layer, as code that comes with a checkpoint has it."""

    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(OwnBlock(config) for _ in range(config.num_hidden_layers))
        self.ln_f = nn.LayerNorm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.wte

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, use_cache=None):  # noqa: ARG002
        x = self.wte(input_ids)
        for block in self.blocks:
            x = block(x)
        return CausalLMOutput(logits=self.head(self.ln_f(x)))


class OwnBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        d, self.heads = config.hidden_size, config.num_attention_heads
        self.ln_1, self.ln_2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.wide, self.narrow = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, x):
        _, T, d = x.shape
        q, k, v = (part.view(T, self.heads, -1).transpose(0, 1) for part in self.qkv(self.ln_1(x))[0].chunk(3, -1))
        scores = (q @ k.transpose(1, 2)) / (d // self.heads) ** 0.5
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), float("-inf"))
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        mixed = (weights / weights.sum(-1, keepdim=True)) @ v
        x = x + self.out(mixed.transpose(0, 1).reshape(1, T, d))
        h = self.wide(self.ln_2(x))
        return x + self.narrow(h * torch.sigmoid(1.702 * h))


def test_a_class_of_the_users_own():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=tiny.VOCABULARY, hidden_size=24, num_hidden_layers=2, num_attention_heads=4)
    model = Own(config).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    assert linearize(model, IDS).certify().reconstruction_error < 1e-12


# the user's model goes on as if nothing had been


def step(model):
    loss = model(IDS, labels=IDS).loss
    model.zero_grad()
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("around", ["plain", "checkpointing", "lora", "compiled"])
def test_training_and_generating_go_on_unchanged(around):
    torch.manual_seed(0)
    model = tiny.llama().train()
    if around == "checkpointing":
        model.gradient_checkpointing_enable()
    elif around == "lora":
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, lora(peft))
    elif around == "compiled":
        model.compile(backend="eager")
    loss, gradients = step(model)
    tokens = model.eval().generate(input_ids=IDS, max_new_tokens=5, do_sample=False)
    model.train()
    linearize(model, IDS).jacobian().dense()
    again, grads = step(model)
    assert torch.equal(loss, again)
    assert len(grads) == len(gradients)
    assert all(torch.equal(a, b) for a, b in zip(gradients, grads, strict=True))
    assert torch.equal(model.eval().generate(input_ids=IDS, max_new_tokens=5, do_sample=False), tokens)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of what peft asks transformers
def test_an_adapter_is_put_on_while_loading(peft, tmp_path):
    tiny.llama().save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(tiny.llama(), lora(peft)).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    model = loclin.load(tmp_path / "base", dtype="float64", adapter=tmp_path / "adapter")
    assert model.info.name.endswith(" + adapter")
    ids = tiny.prompt(5)
    lin = loclin.linearize(model, ids, precision="double")
    expected = loclin.linearize(adapted.merge_and_unload(), ids, precision="double")
    assert lin.certify().passed
    assert torch.allclose(lin.jacobian().dense(), expected.jacobian().dense(), rtol=0, atol=1e-10)
