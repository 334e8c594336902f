"""The decoder blocks of a model, found by inspection."""

from __future__ import annotations

from torch import nn


def find_blocks(root: nn.Module) -> tuple[nn.Module, ...]:
    """The members of the largest list of modules that is not inside another list, nor of tables of embeddings."""
    lists = {
        name: module
        for name, module in root.named_modules()
        if isinstance(module, nn.ModuleList) and not all(isinstance(part, nn.Embedding) for part in module)
    }
    inner = tuple(f"{name}." for name in lists if name)
    outermost = [module for name, module in lists.items() if not name.startswith(inner)]
    largest = max(outermost, key=lambda module: sum(p.numel() for p in module.parameters()), default=None)
    return () if largest is None else tuple(largest)
