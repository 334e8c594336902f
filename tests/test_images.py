"""Images in a prompt: what the vision tower gives are inputs of the map, as the model's own code places them."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

import loclin
import oracle
import pictures
import tiny
from loclin.analyses.attribution.groups import find_groups
from loclin.analyses.nearby import Nearby
from loclin.errors import MissingExtraError, ModelError, OptionError, PromptError
from loclin.models import wrap
from pictures import IMAGE, SIZES

NAMES = list(pictures.MODELS)


@pytest.fixture(scope="module")
def linearized():
    """Each family's model at the same prompt, with the linear path in float64."""
    made = {}

    def at(name: str):
        if name not in made:
            hf, ids = pictures.MODELS[name]("eager"), pictures.prompt(name)
            inputs = pictures.pixels(name) | (pictures.types(name, ids) if name == "gemma3" else {})
            made[name] = hf, ids, loclin.linearize(wrap(hf), ids, inputs=inputs, precision="double")
        return made[name]

    return at


def whole(name: str, ids: Tensor) -> dict[str, Tensor]:
    """All that transformers' processor would give the model."""
    return {"input_ids": ids, **pictures.types(name, ids), **pictures.pixels(name)}


@pytest.mark.parametrize("name", NAMES)
def test_maps_with_images_are_exact(linearized, name):
    hf, ids, lin = linearized(name)
    certificate = lin.certify()
    assert certificate.passed
    errors = "reconstruction_error adjoint_error linearity_error second_derivative row_error"
    assert max(getattr(certificate, error) for error in errors.split()) <= 1e-12
    with torch.no_grad():
        stock = hf(**whole(name, ids)).logits[0, -1]
    assert torch.equal(lin.trace.stock_logits, stock)
    assert not lin.warnings


@pytest.mark.parametrize("name", NAMES)
def test_maps_with_images_are_those_of_the_detached_model(linearized, name):
    hf, ids, lin = linearized(name)
    J, x, y = oracle.given_jacobian(hf, whole(name, ids), -1)
    assert torch.equal(lin.embeddings, x)
    found = lin.jacobian()
    assert (found.dense() - J).norm() <= 1e-11 * J.norm()
    assert (found.value - y).norm() <= 1e-11 * y.norm()
    images = (ids[0] == IMAGE).nonzero().flatten()
    assert (J[:, images].norm(dim=(0, 2)) > 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_shares_sum_to_the_target_and_an_image_is_one_group(linearized, name):
    hf, ids, lin = linearized(name)
    found = lin.attribute(by="token")
    shares, biases = found.by_token()
    assert len(shares) == ids.shape[1]
    assert sum(shares) + biases == pytest.approx(found.target["value"], rel=1e-11)
    groups = {group.name: group for group in lin.attribute(by="word").groups}
    images = (ids[0] == IMAGE).nonzero().flatten().tolist()
    first, second = groups["<image 1>"], groups["<image 2>"]
    assert [*first.positions, *second.positions] == images
    assert (len(first.positions), len(second.positions)) == SIZES[name]


def test_tokens_of_one_image_of_gemma_attend_to_one_another(linearized):
    _, ids, lin = linearized("gemma3")
    first = ids[0].tolist().index(IMAGE)
    ahead = lin.jacobian("embed", "resid_post.0", position=first).dense()
    assert ahead[:, first + 3].norm() > 0
    assert ahead[:, first + 4].norm() == 0


def test_what_is_added_behind_early_layers_is_a_bias_with_a_name(linearized):
    _, _, lin = linearized("qwen3_vl")
    assert "language_model.layers." in lin.trace.sequence.fallback_reason
    J = lin.jacobian()
    parts = J.bias_by_source()
    assert parts["model.language_model.add"].norm() > 0
    assert torch.allclose(sum(parts.values()), J.bias, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_analyses_run_the_model_with_its_images(linearized, name):
    hf, ids, lin = linearized(name)
    for again in (Nearby(lin).embeddings(lin.embeddings[None]), Nearby(lin).tokens(ids)):
        assert torch.equal(again.logits[0], lin.trace.stock_logits)
    assert lin.logit_lens().layers[-1].words[0][0] == lin.next_tokens(1)[0][0]
    first = lin.next_token_ids(1)[0][0]
    longer = torch.cat([ids, torch.tensor([[first]], device=ids.device)], dim=1)
    with torch.no_grad():
        then = int(hf(**whole(name, longer)).logits[0, -1].argmax())
    assert lin.attribute(loclin.Span(generated=2)).target["ids"] == [first, then]
    assert lin.followed_by(first).next_token_ids(1)[0][0] == then
    if lin.trace.sequence.fallback_reason is None:
        assert lin.intervene(["T4"])[0].model != 0
    else:
        with pytest.raises(OptionError, match="no layer whose input"):
            lin.intervene(["T4"])


def test_tokens_of_images_are_not_swapped(linearized):
    _, ids, lin = linearized("llava")
    assert ids[0, 3] == IMAGE
    assert {ray.position for ray in lin.validity(draws=0, swaps=1, sizes=[1.0], position=3).rays} == {0, 1, 2}


def test_a_model_keeps_nothing_of_an_image():
    hf, ids = pictures.qwen2_5(), pictures.prompt("qwen2_5_vl")
    loclin.linearize(wrap(hf), ids, inputs=pictures.pixels("qwen2_5_vl"), strict=False)
    assert hf.model.rope_deltas is None
    vectors = torch.randn(3, 32, dtype=torch.float64)
    before = loclin.linearize(wrap(hf), inputs_embeds=vectors, strict=False).trace.stock_logits
    with torch.no_grad():
        hf(**whole("qwen2_5_vl", ids))
    assert hf.model.rope_deltas is not None
    assert torch.equal(loclin.linearize(wrap(hf), inputs_embeds=vectors, strict=False).trace.stock_logits, before)


@pytest.mark.parametrize("name", ["gemma3", "qwen2_5_vl"])
def test_text_alone_is_as_before(linearized, name):
    hf, ids, lin = linearized(name)
    text = tiny.prompt(5)
    with torch.no_grad():
        stock = hf(input_ids=text).logits[0, -1]
    for model in (wrap(hf), lin.model):  # the second has been at a prompt with images
        assert torch.equal(loclin.linearize(model, text, strict=False).trace.stock_logits, stock)
    (said, *_) = loclin.linearize(wrap(hf), ids[:, :4], strict=False).prompt_warnings
    assert "stands for" in said


@pytest.fixture(scope="module", params=["gemma3", "llava"])
def with_processor(request):
    """A model, its processor, and the token that stands for an image in a text."""
    name = request.param
    processor = pictures.gemma3_processor() if name == "gemma3" else pictures.llava_processor()
    return wrap(pictures.MODELS[name](), processor), processor, processor.image_token


def test_images_go_through_the_processor(with_processor, tmp_path):
    model, processor, token = with_processor
    pictures.image(1).save(tmp_path / "one.png")
    images = [pictures.image(), tmp_path / "one.png"]
    text = f"w5 {token} w9 {token} w7"
    made = processor(text=text, images=[pictures.image(), pictures.image(1)], return_tensors="pt")
    made = made.to(tiny.DEVICE, torch.float64)
    with torch.no_grad():
        stock = model.hf(**made).logits[0, -1]
    for lin in (loclin.linearize(model, text, images=images), loclin.linearize(model, made)):
        assert torch.equal(lin.input_ids, made["input_ids"])
        assert torch.allclose(lin.trace.stock_logits, stock, rtol=1e-12, atol=1e-12)
    assert [group.name for group in find_groups(lin, "word")].count("<image 2>") == 1
    assert (
        loclin.linearize(model, text, images=images, bos=False).input_ids[0].tolist()
        == made["input_ids"][0, 1:].tolist()
    )
    other = loclin.linearize(model, text, images=images[::-1])
    assert other.jacobian().provenance().key() != lin.jacobian().provenance().key()


def test_images_of_a_chat_are_in_front_of_what_the_user_says(with_processor):
    model, _, token = with_processor
    lin = loclin.linearize(model, [{"role": "user", "content": "w5"}], images=pictures.image())
    text = loclin.linearize(model, f"<s>user {token} w5", images=[pictures.image()], bos=False)
    assert torch.equal(lin.input_ids, text.input_ids)
    parts = [{"type": "text", "text": "w5"}, {"type": "image"}]
    behind = loclin.linearize(model, [{"role": "user", "content": parts}], images=[pictures.image()])
    assert behind.input_ids[0].tolist().index(IMAGE) in (3, 4)
    assert torch.equal(lin.trace.stock_logits, text.trace.stock_logits)


def test_images_that_are_refused(with_processor, tmp_path, monkeypatch):
    model, _, token = with_processor
    (tmp_path / "none.png").write_text("no image")
    with pytest.raises(PromptError, match="1 times, and there are 2 images"):
        loclin.linearize(model, f"w5 {token}", images=[pictures.image()] * 2)
    with pytest.raises(PromptError, match="cannot read the image"):
        loclin.linearize(model, f"w5 {token}", images=[tmp_path / "none.png"])
    with pytest.raises(PromptError, match="cannot read the image"):
        loclin.linearize(model, f"w5 {token}", images=[tmp_path / "missing.png"])
    with pytest.raises(PromptError, match="give at least one"):
        loclin.linearize(model, "w5", images=[])
    with pytest.raises(PromptError, match="belong to a text or a chat"):
        loclin.linearize(model, tiny.prompt(4), images=[pictures.image()])
    with pytest.raises(ModelError, match="no processor of images"):
        loclin.linearize(wrap(model.hf, model.tokenizer), f"w5 {token}", images=[pictures.image()])
    with pytest.raises(ModelError, match="takes no images"):
        loclin.linearize(wrap(tiny.llama(), model.tokenizer), "w5", images=[pictures.image()])
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(MissingExtraError, match=r"pip install .loclin\[images\]"):
        loclin.linearize(model, f"w5 {token}", images=[pictures.image()])


@pytest.mark.parametrize("name", NAMES)
def test_other_numbers_of_image_tokens_are_refused(name):
    hf, ids, given = pictures.MODELS[name](), pictures.prompt(name), pictures.pixels(name)
    fewer = torch.cat([ids[:, :3], ids[:, 4:]], dim=1)
    with pytest.raises((PromptError, ModelError), match="tokens"):
        loclin.linearize(wrap(hf), fewer, inputs=given)
    with pytest.raises(PromptError, match="0 image tokens"):
        loclin.linearize(wrap(hf), tiny.prompt(5), inputs=given)
    with pytest.raises(OptionError, match="takes beside tokens"):
        loclin.linearize(wrap(tiny.llama()), tiny.prompt(5), inputs=given)


def test_token_types_that_a_processor_gives_are_kept_where_they_are_the_family_s():
    hf, ids = pictures.paligemma(), torch.tensor([[*[IMAGE] * 8, 1, 5, 7]]).to(tiny.DEVICE)
    made = {"input_ids": ids, "token_type_ids": torch.zeros_like(ids), **pictures.pixels("llava")}
    lin = loclin.linearize(wrap(hf), made)
    first = lin.next_token_ids(1)[0][0]
    more = torch.tensor([[first]], device=ids.device)
    longer = {
        "input_ids": torch.cat([ids, more], 1),
        "token_type_ids": torch.cat([made["token_type_ids"], more * 0 + 1], 1),
    }
    with torch.no_grad():
        stock = hf(**made).logits[0, -1]
        then = hf(**made | longer).logits[0, -1]
    assert torch.allclose(lin.trace.stock_logits, stock, rtol=1e-12, atol=1e-12)
    assert torch.allclose(lin.followed_by(first).trace.stock_logits, then, rtol=1e-12, atol=1e-12)
    assert lin.jacobian("embed", "resid_post.0", position=0).dense()[:, 10].norm() > 0


def test_watch_refuses_images(linearized):
    with pytest.raises(PromptError, match="without images"):
        linearized("llava")[2].watch(["w5"])


def test_a_directory_has_its_processor(tmp_path, capsys):
    """A family that transformers has with images alone is loaded, and the command line gives it images."""
    from cli.test_cli import here

    hf = pictures.llava().float()
    hf.save_pretrained(tmp_path / "model")
    pictures.llava_processor().save_pretrained(tmp_path / "model")
    pictures.image().save(tmp_path / "one.png")
    model = loclin.load(tmp_path / "model")
    lin = loclin.linearize(model, "w5 <image> w9", images=[tmp_path / "one.png"])
    code, _, err = here(
        capsys, "attribute", "w5 <image> w9", "--model", tmp_path / "model", "--image", tmp_path / "one.png",
        "--group", "word", "--json", tmp_path / "out.json",
    )  # fmt: skip
    assert code == 0, err
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["word"]["provenance"]["token_ids"] == lin.input_ids[0].tolist()
    assert "<image 1>" in [group["name"] for group in written["word"]["groups"]]
    code, _, err = here(capsys, "explain", "w5", "--model", tmp_path / "model", "--image", tmp_path / "two.png")
    assert code == 2
    assert "two.png: there is no such file" in err
    code, _, err = here(capsys, "explain", "w5", "--model", tmp_path / "model", "--image", tmp_path / "one.png")
    assert code == 2
    assert "<image> 0 times" in err
