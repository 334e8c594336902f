"""What `bench/claims.py` measures on one prompt, and the networks with random weights that it measures too."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

import loclin
from loclin.analyses.decode import Decoder
from loclin.analyses.logit_lens import logit_lens
from loclin.linearization import Linearization
from loclin.maps.layer_maps import layer_maps
from loclin.models import Model
from loclin.network.points import Point
from loclin.spectral import RitzTriples, ritz_svd, stable_rank

VARIANTS = ("model", "all tokens", "random", "fresh")
"""`model`: the model, layers by the last token's map. `all tokens`: the model, layers by the maps of all tokens side by
side. `random`, `fresh`: the same as `model`, of networks with random weights (see `vary`)."""
WORDS = 10
_DIRECTIONS = 8
_STREAM = ("resid_post",)


def vary(model: Model, variant: str, seed: int) -> Model:
    """A network of the model's shape that has learnt nothing.

    `fresh` has the initial weights of the model's class. `random` has the scales of the trained weights: every matrix
    is normal with its own mean and standard deviation, and the gains of norms are in a random order.
    """
    torch.manual_seed(seed)
    if variant == "fresh":
        return loclin.wrap(type(model.hf)(copy.deepcopy(model.hf.config)).eval(), model.tokenizer)
    network = copy.deepcopy(model.hf)
    with torch.no_grad():
        for weight in network.parameters():
            if weight.dim() > 1:
                weight.normal_(weight.mean().item(), weight.std().item())
            else:
                weight.copy_(weight[torch.randperm(len(weight))])
    return loclin.wrap(network, model.tokenizer)


def measure(model: Model, variant: str, text: str) -> dict[str, Any]:
    """All numbers of one prompt, with a beginning token.

    Cost: the dense map and each layer's own map, about half as much again; for `all tokens` a forward sweep of all
    tokens, about three dense maps.
    """
    lin = loclin.linearize(model, text, bos=True)
    ((target, word, probability),) = lin.next_token_ids(1)
    found = {"tokens": lin.tokens, "non_words": lin.non_words, "target": word, "probability": _short(probability)}
    decoder = Decoder(model)
    if variant == "all tokens":
        return found | follow(lin, decoder, target)
    lens = [layer.rank for layer in logit_lens(lin, target).layers]
    maps = reconstruct(lin) | decode(lin, decoder, target) | descend(lin, decoder, target)
    return found | maps | {"lens": lens}


def reconstruct(lin: Linearization) -> dict[str, Any]:
    """The paper's error of the dense map and of the ordinary Jacobian, and the largest error of one number.

    `std_error` and `ordinary_error` are std(J x + b - y) / std(y); `max_error` is max |J x + b - y| / max |y|.
    """
    J = lin.jacobian()
    J.dense()
    y = J.value
    off, ordinary = J.reconstruct() - y, lin.ordinary_reconstruction() - y
    return {
        "std_error": _short((off.std() / y.std()).item()),
        "max_error": _short((off.abs().max() / y.abs().max()).item()),
        "ordinary_error": _short((ordinary.std() / y.std()).item()),
    }


def decode(lin: Linearization, decoder: Decoder, target: int) -> dict[str, Any]:
    """Stable ranks of all tokens' maps, and the words of each one's first left vector with either sign.

    `word_rank` is the predicted token's rank with the better sign, None where near-equal singular values leave the
    vector undefined. `random_rank`: the same of random directions.
    """
    J = lin.jacobian()
    svd = J.svd(2, tolerance=1e-4, method="block_krylov")
    first = svd.U[:, :, 0]
    alone = [len(svd.blocks(token)[0]) == 1 for token in range(len(first))]
    names = [[name for name, _ in words] for words in decoder.writes(torch.cat([first, -first]), WORDS)]
    ranks = best_ranks(decoder, first, target)
    draws = torch.randn(_DIRECTIONS, first.shape[1], generator=torch.Generator().manual_seed(0)).to(first)
    return {
        "width": first.shape[1],
        "sigma": _shorten(svd.S[:, 0]),
        "stable_rank": _shorten(stable_rank(svd.frobenius, svd.S[:, 0])),
        "word_rank": [rank if single else None for rank, single in zip(ranks, alone, strict=True)],
        "words": [list(both) for both in zip(names[: len(first)], names[len(first) :], strict=True)],
        "random_rank": best_ranks(decoder, draws, target),
    }


def best_ranks(decoder: Decoder, vectors: Tensor, target: int) -> list[int]:
    """A token's rank among the words of each vector `[n, d]` or of its negative, whichever is better."""
    ranks = decoder.ranks(torch.cat([vectors, -vectors]), target)
    return [min(pair) for pair in zip(ranks[: len(vectors)], ranks[len(vectors) :], strict=True)]


def descend(lin: Linearization, decoder: Decoder, target: int) -> dict[str, Any]:
    """Each layer's own map and the last token's map from its embedding, with the final norm on top of both.

    The own map is that of all tokens at the layer's input, side by side. Since no token sees a later one, the last
    token's map from its embedding is the product of its own maps.
    """
    last, product = len(lin.tokens) - 1, torch.eye(lin.trace.width).to(lin.embeddings)
    layers, ranks = list[RitzTriples](), list[Tensor]()
    for item in layer_maps(lin.chain, "layerwise", last, _STREAM, normed=False, budget=lin.allowance):
        norm = lin.chain.norm(Point("resid_post", item.layer), last)
        product = item.maps[last] @ product
        layers.append(ritz_svd(norm.jvp(product.mT).mT[None], 1, norm.value()))
        ranks.append(ritz_svd(norm.jvp(item.joint.mT).mT[None], 1, norm.value()).stable_rank)
    return _describe(layers, decoder, target) | {"own_rank": _shorten(torch.cat(ranks))}


def follow(lin: Linearization, decoder: Decoder, target: int) -> dict[str, Any]:
    """The map of all tokens side by side to each layer, with the final norm on top: stable rank and word rank."""
    found = layer_maps(lin.chain, "cumulative", len(lin.tokens) - 1, _STREAM, budget=lin.allowance)
    return _describe([ritz_svd(item.joint[None], 1, item.value) for item in found], decoder, target)


def _describe(found: list[RitzTriples], decoder: Decoder, target: int) -> dict[str, Any]:
    vectors = torch.stack([one.U[0, :, 0] for one in found])
    return {
        "layer_rank": _shorten(torch.cat([one.stable_rank for one in found])),
        "layer_word": best_ranks(decoder, vectors, target),
    }


def _shorten(numbers: Tensor) -> list[float]:
    return [_short(number) for number in numbers.tolist()]


def _short(number: float) -> float:
    return float(f"{number:.4g}")
