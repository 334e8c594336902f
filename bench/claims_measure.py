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
from loclin.spectral import NEAR_EQUAL, RitzTriples, ritz_svd

VARIANTS = ("model", "random", "fresh", "all tokens", "layers")
"""`model`: the map of all tokens side by side to the final hidden state. `layers`: the last token's map to each layer,
and each layer's own; `random`, `fresh`: the same of networks with random weights (see `vary`). `all tokens`: the maps
of all tokens to each layer."""
NULLS = ("random", "fresh")
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

    Cost: some hundred columns; `layers` and null models each layer's own map, about half a dense map; `all tokens` a
    forward sweep of all tokens' maps, about three dense maps.
    """
    lin = loclin.linearize(model, text, bos=True)
    ((target, word, probability),) = lin.next_token_ids(1)
    found = {"tokens": lin.tokens, "non_words": lin.non_words, "target": word, "probability": _short(probability)}
    decoder = Decoder(model)
    if variant == "all tokens":
        return found | follow(lin, decoder, target)
    if variant != "model":
        return found | descend(lin, decoder, target)
    return found | reconstruct(lin) | {"whole": decompose(lin, decoder, target)}


def reconstruct(lin: Linearization) -> dict[str, Any]:
    """The paper's error of the frozen map and of the ordinary Jacobian, and the largest error of one number.

    `std_error` and `ordinary_error` are std(J x + b - y) / std(y); `max_error` is max |J x + b - y| / max |y|.
    """
    J = lin.jacobian()
    y = J.value
    off, ordinary = J.reconstruct() - y, lin.ordinary_reconstruction() - y
    return {
        "width": len(y),
        "std_error": _short((off.std() / y.std()).item()),
        "max_error": _short((off.abs().max() / y.abs().max()).item()),
        "ordinary_error": _short((ordinary.std() / y.std()).item()),
    }


def decompose(lin: Linearization, decoder: Decoder, target: int) -> dict[str, Any]:
    """The map of all tokens side by side to the final hidden state: its first left vector in words.

    `random_rank`: the predicted token's rank among the words of random directions.
    """
    svd = lin.jacobian().svd(1, joint=True)
    draws = torch.randn(_DIRECTIONS, len(svd.U), generator=torch.Generator().manual_seed(0)).to(svd.U)
    (first,) = put_into_words(svd.U[None, :, 0], svd.S[None], decoder, target)
    return first | {"random_rank": best_ranks(decoder, draws, target)}


def put_into_words(vectors: Tensor, S: Tensor, decoder: Decoder, target: int) -> list[dict[str, Any]]:
    """The first words of each map's first left vector `[n, d]` with both signs, and the predicted token's better rank.

    No rank where the first two singular values, if there are two of the `[n, k]`, are nearly equal, which leaves the
    vector undefined.
    """
    names = [[name for name, _ in words] for words in decoder.writes(torch.cat([vectors, -vectors]), WORDS)]
    sides = zip(names[: len(vectors)], names[len(vectors) :], strict=True)
    defined = (S[:, 1:2] < (1 - NEAR_EQUAL) * S[:, :1]).all(1).tolist()
    return [
        {"words": list(both), "word_rank": rank if single else None}
        for both, rank, single in zip(sides, best_ranks(decoder, vectors, target), defined, strict=True)
    ]


def best_ranks(decoder: Decoder, vectors: Tensor, target: int) -> list[int]:
    """A token's rank among the words of each vector `[n, d]` or of its negative, whichever is better."""
    ranks = decoder.ranks(torch.cat([vectors, -vectors]), target)
    return [min(pair) for pair in zip(ranks[: len(vectors)], ranks[len(vectors) :], strict=True)]


def descend(lin: Linearization, decoder: Decoder, target: int) -> dict[str, Any]:
    """Each layer's own map, and the last token's map from its embedding to each layer, with the final norm on top.

    Own maps are from all tokens at the layer's input, side by side. Since no token sees a later one, the last token's
    map from its embedding is the product of its own parts of these. `lens` is the word rank of the logit lens.
    """
    last, product = len(lin.tokens) - 1, torch.eye(lin.trace.width).to(lin.embeddings)
    found, own = list[RitzTriples](), list[Tensor]()
    for item in layer_maps(lin.chain, "layerwise", last, _STREAM, normed=False, budget=lin.allowance):
        norm = lin.chain.norm(Point("resid_post", item.layer), last)
        product = item.maps[last] @ product
        is_last = item.layer == lin.trace.n_layers - 1
        found.append(ritz_svd(norm.jvp(product.mT).mT[None], 2 if is_last else 1, norm.value()))
        own.append(ritz_svd(norm.jvp(item.joint.mT).mT[None], 1, norm.value()).stable_rank)
    (vector,) = put_into_words(found[-1].U[:, :, 0], found[-1].S, decoder, target)
    lens = [layer.rank for layer in logit_lens(lin, target).layers]
    ranks = {"own_rank": shorten(torch.cat(own)), "lens": lens}
    return describe_layers(found, decoder, target) | ranks | {"last": vector}


def follow(lin: Linearization, decoder: Decoder, target: int) -> dict[str, Any]:
    """The maps of all tokens: side by side to each layer, and of each token to the final hidden state."""
    found = []
    for item in layer_maps(lin.chain, "cumulative", len(lin.tokens) - 1, _STREAM, budget=lin.allowance):
        found.append(ritz_svd(item.joint[None], 1, item.value))
        if item.layer == lin.trace.n_layers - 1:  # whose maps with the norm are those to the final hidden state
            each, error = ritz_svd(item.maps, 2, item.value), item.reconstruction_error
    return describe_layers(found, decoder, target) | {
        "dense_error": _short(error),
        "stable_rank": shorten(each.stable_rank),
        "each": put_into_words(each.U[:, :, 0], each.S, decoder, target),
    }


def describe_layers(found: list[RitzTriples], decoder: Decoder, target: int) -> dict[str, Any]:
    """The stable rank of the first map of each layer, and the predicted token's rank in its first left vector."""
    vectors = torch.stack([one.U[0, :, 0] for one in found])
    return {
        "layer_rank": shorten(torch.cat([one.stable_rank for one in found])),
        "layer_word": best_ranks(decoder, vectors, target),
    }


def shorten(numbers: Tensor) -> list[float]:
    return [_short(number) for number in numbers.tolist()]


def _short(number: float) -> float:
    return float(f"{number:.4g}")
