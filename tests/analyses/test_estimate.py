"""Plans: what is counted without numbers is what runs with them."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import loclin
from loclin.analyses.attribution.attribute import attribute
from loclin.common.rehearsal import rehearse
from loclin.errors import ModelError, OptionError
from loclin.maps.linearized import Linearized
from loclin.models import tiny
from loclin.network.anatomy import find_anatomy
from loclin.network.cost import given_rate
from loclin.network.sequence import find_sequence, known_sublayers

GIVEN = {"rate_flops": 1e11, "rate_memory": 1e10, "available": "4GB", "memory": "100MB"}
WORK = {
    "dense": lambda lin: lin.jacobian().dense(),
    "certify": lambda lin: lin.certify(),
    "by token": lambda lin: attribute(lin, in_words=0),
    "by layer": lambda lin: attribute(lin, by="layer", in_words=0),
    "by head": lambda lin: attribute(lin, by="head", in_words=0),
    "lapack": lambda lin: lin.jacobian().svd(2, method="lapack"),
}
FAMILIES = ("llama", "qwen2", "qwen3", "gemma3_text", "phi3", "olmo2", "gpt2")


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # flops of other threads are not counted
    yield
    torch.set_num_threads(threads)


def linearized(hf, length=6):
    return Linearized.at(loclin.wrap(hf), torch.arange(3, 3 + length)[None], memory="10MB", strict=False)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", WORK)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("one_thread")
def test_flops_are_those_of_the_run(family, name):
    # float64, in which no sum is computed again; eager attention, whose products are all counted
    hf = tiny.build(family, dtype=torch.float64, attn="eager")
    small = loclin.wrap(hf)
    blocks = find_sequence(small, find_anatomy(hf), tiny.prompt(hf)).blocks
    empty, made = copy.deepcopy(hf).to("meta"), []
    tokens = known_sublayers.set(None), given_rate.set(1e11)
    try:
        with FlopCounterMode(display=False) as counter:
            lin = linearized(hf)
            traced = counter.get_total_flops()
            WORK[name](lin)
        known_sublayers.set(blocks[0].sublayers)
        with rehearse([*empty.parameters(), *empty.buffers()]) as rehearsal:
            first = rehearsal.cost(lambda: made.append(linearized(empty)))
            second = rehearsal.cost(lambda: WORK[name](made[0]))
    finally:
        known_sublayers.reset(tokens[0])
        given_rate.reset(tokens[1])
    assert (first.flops, second.flops) == (traced, counter.get_total_flops() - traced)


def config(directory):
    return json.loads((directory / "config.json").read_text())


def planned(directory, **options):
    return loclin.estimate(str(directory), **{"tokens": 4, "analyses": ["dense"], **GIVEN, **options})


def test_memory_is_that_of_what_is_held(directory):
    found = planned(directory)
    linearize, dense = found.analyses
    d = config(directory)["hidden_size"]
    assert dense.result == d * 4 * d * 4
    assert linearize.result == 0
    assert linearize.trace == dense.trace > 0
    assert dense.peak >= found.weights + dense.trace + dense.result
    assert found.weights == found.stored >= 4 * found.n_parameters
    longer = planned(directory, tokens=8).analyses[1]
    assert longer.result == 2 * dense.result
    assert (longer.flops, longer.trace, longer.seconds) > (dense.flops, dense.trace, 0)


def test_layers_on_disk_are_read_and_not_held(directory):
    memory, disk = planned(directory), planned(directory, stream=True)
    assert disk.stored == memory.stored
    assert disk.analyses[1].read > 0 == memory.analyses[1].read
    assert [one.flops for one in disk.analyses] == [one.flops for one in memory.analyses]


def test_deep_models_are_rehearsed_with_fewer_layers(directory, tmp_path):
    for layers in (4, 9):
        changed = config(directory) | {"num_hidden_layers": layers}
        changed.pop("layer_types", None)
        (tmp_path / f"{layers}.json").write_text(json.dumps(changed))
    few, more = (planned("any", config_file=tmp_path / f"{layers}.json").analyses[1] for layers in (4, 9))
    deeper = tmp_path / "14.json"
    deeper.write_text(json.dumps(changed | {"num_hidden_layers": 14}))
    assert planned("any", config_file=deeper).analyses[1].flops - more.flops == more.flops - few.flops


def test_what_does_not_fit_is_advised(directory):
    (_, dense) = planned(directory, available="20KB").analyses
    assert not dense.fits
    assert dense.advice


def test_a_plan_computes_nothing_and_leaves_no_trace(directory):
    before = torch.get_num_threads(), torch.zeros(2).device
    planned(directory)
    assert (torch.get_num_threads(), torch.zeros(2).device) == before
    assert torch.zeros(3).tolist() == [0.0] * 3


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"tokens": 0}, OptionError, "tokens"),
        ({"tokens": 10**9}, OptionError, "positions"),
        ({"analyses": ["sideways"]}, OptionError, "explain"),
        ({"config_file": "absent.json"}, ModelError, "--config-file"),
        ({"available": "plenty"}, OptionError, "plenty"),
        ({"dtype": "float7"}, OptionError, "float7"),
    ],
)
def test_mistakes(directory, options, error, said):
    with pytest.raises(error, match=said):
        planned(directory, **options)


def test_configs_that_are_none(tmp_path):
    for text, said in (
        ("{", "config"),
        ('{"model_type": "t5", "is_encoder_decoder": true}', "encoder-decoder"),
        ('{"model_type": "nonsense"}', "nonsense"),
        ("[1]", "config"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ModelError, match=said):
            planned("any", config_file=tmp_path / "config.json")


def test_a_plan_without_a_network_names_the_file(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="--config-file"):
        planned("nobody/nothing")


def test_a_budget_that_is_too_small_is_in_the_plan(directory):
    (_, dense) = planned(directory, memory=1000).analyses
    assert not dense.fits
    (_, enough) = planned(directory, memory=int(dense.advice.removeprefix("memory=").split(",")[0])).analyses
    assert enough.fits
    assert (enough.flops, enough.peak, enough.advice) == (dense.flops, dense.peak, "")
