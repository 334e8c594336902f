"""Results come back as they were, know where they came from, and can be compared."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields, replace

import pytest
import torch
from torch import Tensor

import tiny
from loclin import SVD, compare
from loclin.errors import OptionError, ResultError
from loclin.linearization import linearize
from loclin.results.provenance import Provenance
from loclin.results.result import Result
from loclin.results.serialise import from_plain, to_plain


@dataclass(frozen=True)
class Mixed(Result):
    values: Tensor
    maybe: Tensor | None
    failure: float
    route: str
    columns: int
    provenance: Provenance | None = None


MIXED = Mixed(torch.randn(3, 2).half(), None, 1e-300 / 3, "dense", 7)


@pytest.fixture(scope="module")
def lin():
    return linearize(tiny.gemma3(), tiny.prompt(5), precision="double")


@pytest.fixture(scope="module")
def J(lin):
    return lin.jacobian()


@pytest.mark.parametrize("joint", [False, True])
def test_spectra_come_back_bit_for_bit(J, tmp_path, joint):
    found = J.svd(k=3, joint=joint)
    found.save(tmp_path / "svd.safetensors")
    again = SVD.load(tmp_path / "svd.safetensors")
    assert again.provenance == found.provenance
    for field in fields(SVD):
        if isinstance(getattr(found, field.name), Tensor):
            assert torch.equal(getattr(again, field.name), getattr(found, field.name))
            assert getattr(again, field.name).dtype == torch.float64


@pytest.mark.parametrize("maybe", [None, torch.arange(4)])
def test_any_dataclass_comes_back(J, tmp_path, maybe):
    mixed = replace(MIXED, maybe=maybe, provenance=J.provenance())
    mixed.save(tmp_path / "mixed.safetensors")
    again = Mixed.load(tmp_path / "mixed.safetensors")
    assert torch.equal(again.values, mixed.values)
    assert again.maybe is None if maybe is None else torch.equal(again.maybe, maybe)
    assert replace(again, values=mixed.values, maybe=maybe) == mixed


def test_the_wrong_class_is_refused(tmp_path):
    MIXED.save(tmp_path / "mixed.safetensors")
    with pytest.raises(ResultError, match="holds Mixed, not SVD"):
        SVD.load(tmp_path / "mixed.safetensors")

    @dataclass(frozen=True)
    class Other(Result):
        new: Tensor
        provenance: Provenance | None = None

    Other.__name__ = "Mixed"
    with pytest.raises(ResultError, match="another version of loclin"):
        Other.load(tmp_path / "mixed.safetensors")


def test_provenance_says_which_map(lin):
    J = lin.jacobian("resid_post.0", "mlp_out.1", position=2)
    known = J.block(1).provenance()
    assert (known.source, known.target, known.position, known.positions) == ("resid_post.0", "mlp_out.1", 2, [1])
    assert known.token_ids == lin.input_ids[0].tolist()
    assert known.tokens == lin.tokens
    assert (known.gate, known.precision, known.dtype) == ("activation", "double", "float64")
    assert known.model == lin.model.info
    assert known.versions.keys() == {"loclin", "torch", "transformers", "python"}
    assert known.certificate is None
    assert from_plain(to_plain(known), Provenance) == known
    assert {"versions", "date", "certificate"}.isdisjoint(known.key())


def test_the_certificate_is_kept_once_there_is_one(tmp_path):
    lin = linearize(tiny.llama(), tiny.prompt(4), precision="double")
    J = lin.jacobian()
    assert J.provenance().certificate is None
    certificate = lin.certify()
    J.svd(k=2).save(tmp_path / "svd.safetensors")
    known = SVD.load(tmp_path / "svd.safetensors").provenance
    assert known is not None
    assert known.certificate == certificate.facts()
    assert J.block(0).provenance().certificate == certificate.facts()


def test_comparing(lin, J):
    found = J.svd(k=2)
    same = compare(found, J.svd(k=2))
    assert same.differences == {}
    assert set(same.errors.values()) == {0.0}
    half = linearize(lin.model, lin.input_ids, gate="half", precision="double").jacobian().svd(k=2)
    other = compare(half, found)
    assert other.differences["gate"] == ("half", "activation")
    assert other.errors["S"] == pytest.approx(((half.S - found.S).norm() / found.S.norm()).item())
    with pytest.raises(OptionError, match="with the same k"):
        compare(found, J.svd(k=3))
    with pytest.raises(OptionError, match="two of one kind"):
        compare(found, MIXED)
    assert compare(MIXED, MIXED).errors == {"values": 0.0, "failure": 0.0}


def test_spectra_as_a_table(lin, J):
    pytest.importorskip("pandas")
    found = J.svd(k=3)
    table = found.to_dataframe()
    assert list(table.columns[:4]) == ["token", "text", "rank", "singular_value"]
    assert len(table) == 15
    assert table["singular_value"].tolist() == found.S.flatten().tolist()
    assert table["text"].tolist()[::3] == lin.tokens
    assert table[(table.token == 2) & (table["rank"] == 1)].singular_value.item() == found.S[2, 1].item()
    block = J.block(4).svd(k=2).to_dataframe()
    assert block["token"].tolist() == [4, 4]
    joint = J.svd(k=2, joint=True).to_dataframe()
    assert list(joint.columns[:2]) == ["rank", "singular_value"]
    unknown = replace(found, provenance=None).to_dataframe()
    assert "text" not in unknown
    assert unknown["token"].tolist() == table["token"].tolist()


def test_a_map_as_a_table(lin, J):
    pytest.importorskip("pandas")
    table = J.to_dataframe()
    assert table["token"].tolist() == list(range(5))
    assert table["text"].tolist() == lin.tokens
    assert table["frobenius_norm"].tolist() == J.frobenius_norm().tolist()
    assert table["stable_rank"].tolist() == J.stable_rank().tolist()
    assert table["singular_value"].tolist() == pytest.approx(J.singular_values()[:, 0].tolist())


def test_without_pandas_the_fix_is_named(J, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"pip install \"loclin\[pandas\]\""):
        J.to_dataframe()
