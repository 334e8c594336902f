"""Layer and strength are chosen by the texts that they write, and a text that is not steered says so."""

from __future__ import annotations

import re

import pytest

import loclin.report  # noqa: F401 (its pages)
import loclin.steering.steer as module
from loclin.models import load
from loclin.results import display
from loclin.steering.writing import Continuation

NORMAL = Continuation("w3 w3", [3, 3], ended=False, loss=1.0, repetition=0.0, frequency=5.0)
CELLS = [(layer, strength) for layer in (0, 1) for strength in (0.1, 0.2, 0.4, 0.7, 1.0, 1.5, 2.0)]


def said(frequency=0.0, repetition=0.0):
    return Continuation("w4", [4], ended=False, loss=1.0, repetition=repetition, frequency=float(frequency))


@pytest.fixture
def steered(directory, monkeypatch):
    """Steer with settings that write what they are told to; a text unlike the normal one, unless told."""

    def run(texts, **options):
        made = {}

        def write(_model, prompts, _words, *, steering=None, strength=0.0, **_options):
            if steering is None:
                return [NORMAL]
            layer = int(steering.point.split(".")[1])
            assert len(prompts) == len(strength)
            made.update({(layer, s): texts.get((layer, s), said()) for s in strength})
            return [made[layer, s] for s in strength]

        monkeypatch.setattr(module, "write", write)
        options = {"max_kl": 1e9, "method": "random"} | options
        return module.steer(load(str(directory)), "w3 w4", ["w7 w8"], words=["w9"], **options)

    return run


def test_the_setting_is_taken_whose_text_says_most_of_the_words(steered):
    found = steered({(0, 0.4): said(10), (1, 0.7): said(30), (1, 1.5): said(90, repetition=0.9), (0, 2.0): said(20)})
    assert (found.layer, found.strength) == (1, 0.7)
    assert found.sweep.best.written == found.steered == said(30)
    assert {(trial.layer, trial.strength) for trial in found.sweep.trials if trial.written} == set(CELLS)
    assert found.warnings == []


def test_of_equal_texts_the_one_is_taken_that_gains_most(steered):
    found = steered(dict.fromkeys(CELLS, said(30)))
    assert found.sweep.best.gain == max(trial.gain for trial in found.sweep.trials)


def test_a_text_that_is_not_steered_says_so(steered):
    found = steered(dict.fromkeys(CELLS, said(5)), max_kl=1e9)
    (warning,) = found.warnings
    assert re.search(r"--max-kl 1e\+09 .*\bw9\b.*--max-kl 2e\+09", warning)
    assert warning in found.to_json()
    assert warning in display.page(found)
    (warning,) = steered({}, layer=1, strength=0.5).warnings
    assert "no more often than the normal one" in warning
    assert steered({}, layer=1, strength=0.0).warnings == []


def test_of_texts_that_all_repeat_themselves_the_least_is_taken_with_a_warning(steered):
    texts = {cell: said(50, repetition=0.9) for cell in CELLS} | {(1, 0.2): said(20, repetition=0.5)}
    found = steered(texts)
    assert (found.layer, found.strength) == (1, 0.2)
    (warning,) = found.warnings
    assert "repeats itself" in warning


def test_a_text_that_repeats_itself_is_taken_before_one_that_is_not_steered(steered):
    found = steered({(0, 1.0): said(50, repetition=0.9), (1, 2.0): said(10, repetition=0.6)})
    assert (found.layer, found.strength) == (1, 2.0)
    (warning,) = found.warnings
    assert "repeats itself" in warning


def test_a_limit_that_no_setting_keeps_is_told(steered):
    found = steered(dict.fromkeys(CELLS, said(50)), max_kl=0.0, strength=1.5)
    assert found.sweep.best.kl == min(trial.kl for trial in found.sweep.trials)
    (warning,) = found.warnings
    assert "keeps within --max-kl 0" in warning
