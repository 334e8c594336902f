"""What `bench/claims.py` measures on one prompt, and the networks with random weights that it measures too."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

import loclin
from loclin.analyses.decode import Decoder
from loclin.analyses.logit_lens import logit_lens
from loclin.linearization import Linearization
from loclin.maps.layer_maps import layer_maps
from loclin.models import Model
from loclin.network.blocks import CausalBlock, Workspace
from loclin.network.points import Point
from loclin.spectral import RitzTriples, ritz_svd
from loclin.spectral.result import near_equal

VARIANTS = ("model", "all tokens", "random", "fresh")
"""`model`: the model, layers by the last token's map. `all tokens`: the model, layers by the maps of all tokens side by
side. `random`, `fresh`: the same as `model`, of networks with random weights (see `vary`)."""
WORDS = 10
_DIRECTIONS = 8


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

    Cost: some hundred columns; for `all tokens` a forward sweep of all tokens' maps, about three dense maps.
    """
    lin = loclin.linearize(model, text, bos=True)
    ((target, word, probability),) = lin.next_token_ids(1)
    found = {"tokens": lin.tokens, "non_words": lin.non_words, "target": word, "probability": _short(probability)}
    decoder = Decoder(model)
    if variant == "all tokens":
        return found | follow(lin, decoder, target)
    lens = [layer.rank for layer in logit_lens(lin, target).layers]
    maps = {"whole": decompose(lin, decoder, target)} | descend(lin, decoder, target)
    return found | reconstruct(lin) | maps | {"lens": lens}


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
    svd = lin.jacobian().svd(2, joint=True)
    draws = torch.randn(_DIRECTIONS, len(svd.U), generator=torch.Generator().manual_seed(0)).to(svd.U)
    (first,) = _put_into_words(svd.U[None, :, 0], [len(svd.blocks()[0]) == 1], decoder, target)
    return first | {"random_rank": best_ranks(decoder, draws, target)}


def _put_into_words(vectors: Tensor, alone: list[bool], decoder: Decoder, target: int) -> list[dict[str, Any]]:
    """The first words of each vector `[n, d]` and of its negative, and the predicted token's rank with the better sign.

    No rank where near-equal singular values leave a vector undefined, so that it is not `alone`.
    """
    names = [[name for name, _ in words] for words in decoder.writes(torch.cat([vectors, -vectors]), WORDS)]
    sides = zip(names[: len(vectors)], names[len(vectors) :], strict=True)
    ranks = best_ranks(decoder, vectors, target)
    return [
        {"words": list(both), "word_rank": rank if single else None}
        for both, rank, single in zip(sides, ranks, alone, strict=True)
    ]


def best_ranks(decoder: Decoder, vectors: Tensor, target: int) -> list[int]:
    """A token's rank among the words of each vector `[n, d]` or of its negative, whichever is better."""
    ranks = decoder.ranks(torch.cat([vectors, -vectors]), target)
    return [min(pair) for pair in zip(ranks[: len(vectors)], ranks[len(vectors) :], strict=True)]


def own_maps(lin: Linearization) -> Iterator[Float[Tensor, "d d"]]:
    """Each layer's map of the last token, from the layer's input to its output. Cost: d columns at one position."""
    last, workspace = len(lin.tokens) - 1, Workspace()
    for layer in range(lin.trace.n_layers):
        explicit = lin.chain.explicit_layer(layer, workspace)
        if explicit is None:
            yield lin.jacobian(f"resid_pre.{layer}", f"resid_post.{layer}").block(last).dense()[:, 0]
            continue
        pushed = torch.eye(lin.trace.width).to(lin.embeddings)[None]
        explicit.jvp([CausalBlock(last, pushed)], slice(last, last + 1))
        yield pushed[0].mT


def descend(lin: Linearization, decoder: Decoder, target: int) -> dict[str, Any]:
    """The last token's maps, with the final norm on top: each layer's own, and from the embedding to each layer.

    Since no token sees a later one, the last token's map from its embedding is the product of its own maps.
    """
    product, found, own = torch.eye(lin.trace.width).to(lin.embeddings), list[RitzTriples](), list[Tensor]()
    for layer, map_ in enumerate(own_maps(lin)):
        norm = lin.chain.norm(Point("resid_post", layer), len(lin.tokens) - 1)
        product = map_ @ product
        pair = torch.stack([norm.jvp(one.mT).mT for one in (product, map_)])
        triples = ritz_svd(pair, 1, norm.value())
        found.append(triples)
        own.append(triples.stable_rank[1:])
    # near-equal singular values matter only where the vector is put into words
    final = ritz_svd(pair[:1], 2, norm.value())
    alone = len(near_equal(final.S[0], final.S[0], final.S[0])[0]) == 1
    (last,) = _put_into_words(final.U[:, :, 0], [alone], decoder, target)
    return _describe(found, decoder, target) | {"own_rank": _shorten(torch.cat(own)), "last": last}


def follow(lin: Linearization, decoder: Decoder, target: int) -> dict[str, Any]:
    """The maps of all tokens: side by side to each layer and of each layer, and of each token to the final state."""
    sweeps: dict[str, Any] = {"position": len(lin.tokens) - 1, "components": ("resid_post",), "budget": lin.allowance}
    found = []
    for item in layer_maps(lin.chain, "cumulative", **sweeps):
        found.append(ritz_svd(item.joint[None], 1, item.value))
        if item.layer == lin.trace.n_layers - 1:
            each, error = ritz_svd(item.maps, 2, item.value), item.reconstruction_error
    alone = [len(near_equal(S, S, S)[0]) == 1 for S in each.S]
    own = [
        ritz_svd(item.joint[None], 1, item.value).stable_rank for item in layer_maps(lin.chain, "layerwise", **sweeps)
    ]
    return _describe(found, decoder, target) | {
        "own_rank": _shorten(torch.cat(own)),
        "dense_error": _short(error),
        "stable_rank": _shorten(each.stable_rank),
        "sigma": _shorten(each.S[:, 0]),
        "each": _put_into_words(each.U[:, :, 0], alone, decoder, target),
    }


def _describe(found: list[RitzTriples], decoder: Decoder, target: int) -> dict[str, Any]:
    vectors = torch.stack([one.U[0, :, 0] for one in found])
    return {
        "layer_rank": _shorten(torch.cat([one.stable_rank[:1] for one in found])),
        "layer_word": best_ranks(decoder, vectors, target),
    }


def _shorten(numbers: Tensor) -> list[float]:
    return [_short(number) for number in numbers.tolist()]


def _short(number: float) -> float:
    return float(f"{number:.4g}")
