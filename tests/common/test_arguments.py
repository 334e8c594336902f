"""What is a list, what is a number, and what is neither."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import loclin
import tiny
from loclin.common.arguments import real, strings, whole
from loclin.errors import OptionError
from loclin.steering.concepts import token_ids
from loclin.steering.steer import steer
from loclin.steering.vector import mean_difference
from loclin.steering.watch import watch


def test_a_string_is_no_list_of_strings():
    assert strings("words", ("a", "b")) == ["a", "b"]
    with pytest.raises(OptionError, match=r"words='bridge' is one string: give a list, words=\['bridge'\]"):
        strings("words", "bridge")
    with pytest.raises(OptionError, match="words holds 3"):
        strings("words", ["a", 3])
    with pytest.raises(OptionError, match="give a list of strings"):
        strings("words", 3)


@pytest.mark.parametrize("given", [3, np.int64(3), np.uint8(3), torch.tensor(3)])
def test_whole_numbers_of_every_library_are_python_s(given):
    assert whole("k", given) == 3
    assert type(whole("k", given)) is int


@pytest.mark.parametrize("given", [True, np.True_, 3.0, "3", None, [3], torch.tensor([3, 4])])
def test_what_is_no_whole_number_is_refused(given):
    with pytest.raises(OptionError, match="k=.*: give a whole number"):
        whole("k", given)


def test_numbers_are_finite():
    assert [real("x", given) for given in (1, 0.5, np.float32(0.5), torch.tensor(0.5))] == [1.0, 0.5, 0.5, 0.5]
    for given in (float("nan"), np.inf, True, "1", None, [1.0, 2.0]):
        with pytest.raises(OptionError, match="give a finite number"):
            real("x", given)


@pytest.fixture(scope="module")
def lin():
    return loclin.linearize(tiny.llama(), torch.tensor([[3, 4, 5, 6]]))


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("parts", lambda lin: lin.path("L0H0")),
        ("components", lambda lin: lin.layer_spectra(components="attn_out")),
        ("words", lambda lin: watch(lin, "bridge")),
        ("words", lambda lin: token_ids(lin.model, "bridge")),
        ("texts", lambda lin: mean_difference(lin.model, "a text", ["others"], "resid_post.0")),
        ("others", lambda lin: mean_difference(lin.model, ["a text"], "others", "resid_post.0")),
        ("toward", lambda lin: steer(lin.model, "a", "text")),
        ("words", lambda lin: steer(lin.model, "a", ["text"], words="bridge")),
    ],
)
def test_a_bare_string_is_refused_where_a_list_is_meant(lin, name, call):
    with pytest.raises(OptionError, match=f"{name}='.*' is one string: give a list"):
        call(lin)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_vector_that_is_not_finite_is_refused(lin, bad):
    J = lin.jacobian()
    x, u = J.input.clone(), J.value.clone()
    x[1, 2] = u[2] = bad
    for call in (
        lambda: lin.attribute(u),
        lambda: lin.attribute(loclin.Direction(u)),
        lambda: J.matvec(x),
        lambda: J.rmatvec(u),
        lambda: J.matmat(x[None]),
        lambda: J.rmatmat(u[None]),
    ):
        with pytest.raises(OptionError, match="1 of .* numbers that are NaN or infinite"):
            call()


def test_an_id_is_no_direction(lin):
    assert lin.attribute(torch.tensor(5)).target["ids"] == [5]
    assert lin.attribute(torch.tensor([5, 6])).target["ids"] == [5, 6]
    with pytest.raises(OptionError, match="a direction is a vector of real numbers"):
        lin.attribute(torch.tensor([[5, 6]]))
    with pytest.raises(OptionError, match="target True"):
        lin.attribute(True)  # noqa: FBT003
    vector = np.asarray(lin.value("final")[-1])
    assert lin.attribute(vector).value == lin.attribute(torch.tensor(vector)).value


_NUMPY = """
import sys
import numpy as np, torch
import tiny, loclin
from loclin.analyses.layers import explain_layers
from loclin.steering import Operator, merge
from loclin.steering.vector import contrast, pullback

i, folder = np.int64, sys.argv[1]
lin = loclin.linearize(tiny.llama(), np.array([3, 4, 5, 6]))
assert lin.attribute(i(5), position=i(2), in_words=i(3), by="head").to_json()
assert lin.attribute(loclin.Neuron(i(3), i(1))).to_json()
assert lin.attribute((i(5), i(6))).to_json()
lin.attribute(loclin.Margin(i(5))).save(folder + "/a.safetensors")
assert loclin.explain(lin, k=i(2), position=i(2)).to_json()
assert lin.explore(np.array([5]), count=i(2), position=i(2)).to_json()
assert loclin.generate(lin, i(2), k=i(2)).to_json()
assert explain_layers(lin, k=i(2), position=i(1)).to_json()
sizes = np.array([0.1, 1.0], dtype=np.float32)
assert loclin.validity(lin, position=i(2), sizes=sizes, draws=i(1), swaps=i(1), seed=i(3)).to_json()
assert lin.similarity(position=i(2)).to_json()
J = lin.jacobian("resid_pre.1", position=i(2))
J.svd(i(3), tolerance=np.float32(1e-3), seed=i(1)).save(folder + "/b.safetensors")
lin.layer_spectra(k=i(2), position=i(2), tolerance=np.float32(1e-3)).save(folder + "/c.safetensors")
assert lin.head(i(1), i(0), i(5), k=i(2), position=i(2)).to_dict()["share"]
assert lin.attention_score("L1H0", key=i(1), query=i(2), skip=[i(0)]).to_json()
assert lin.intervene("T1", at=[i(1)], target=i(5), position=i(2)).to_json()
assert lin.patch(lin, i(5), position=i(2), verify=i(1)).to_json()
assert lin.attribute((np.array([5, 6]), [i(4)]), by="head").to_json()
assert lin.attribute([i(5), i(6)], by={"a": [i(0)]}, skip=[i(1)]).to_json()
lin.path(["L0H0"], i(5), token=i(1))
lin.followed_by(i(5)).next_tokens(i(2), position=i(0))
one = Operator.make(lin, i(1), rank=i(2), positions=[i(1), i(2)], position=i(2))
merge([one, one], np.array([0.5, 0.5], dtype=np.float32)).save(folder + "/d.safetensors")
pullback(lin, "resid_post.0", np.array([3, 4])).save(folder + "/e.safetensors")
try:
    contrast(lin.model, ["ab"], "resid_post.0")
except loclin.LoclinError as refused:
    assert "pairs of texts" in str(refused)
    print("all taken")
"""


def test_numpy_s_numbers_are_taken_everywhere_and_saved(tmp_path):
    """In a process of its own: here, types are checked at every call."""
    here = Path(__file__).parents[1]
    found = subprocess.run(
        [sys.executable, "-W", "error", "-c", _NUMPY, str(tmp_path)], capture_output=True, text=True, cwd=here
    )
    assert found.stdout.strip() == "all taken", found.stderr


def test_the_byte_order_mark_of_a_file_is_no_text():
    """As the shell puts it into an argument; standard input has a test of its own."""
    from types import SimpleNamespace

    from loclin.cli import options

    prompt = SimpleNamespace(param_type_name="argument", name="prompt")
    assert options.plain(None, prompt, "\ufeffThe bridge") == "The bridge"
