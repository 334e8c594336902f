"""What an installed wheel does without a checkout beside it: `python installed.py`, with loclin installed.

Packaged data is read, and a small network is mapped and shown.
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import loclin
from loclin.analyses.faithfulness import prompts
from loclin.steering.concepts import packaged_concepts


def main() -> None:
    """Print where loclin was found, once all of it has worked."""
    assert len(prompts.load_prompts()) > 100
    assert packaged_concepts().concepts
    torch.manual_seed(0)
    sizes = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 16}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=2))
    lin = loclin.linearize(model.eval(), torch.arange(1, 5)[None])
    assert lin.certify().passed
    assert "<style" in lin.explain(k=1)._repr_html_()
    print(loclin.__file__)


if __name__ == "__main__":
    main()
