"""Shapes and types of everything in loclin are checked at run time, in tests only.

All but `loclin.freeze`, whose functions run at every torch operation: there the check would take ten times the work.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

spec = find_spec("loclin")
assert spec is not None
assert spec.submodule_search_locations is not None
package = Path(spec.submodule_search_locations[0])
rooms = [f"loclin.{path.stem}" for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
install_import_hook([room for room in rooms if room not in ("loclin.freeze", "loclin.__init__")], "beartype.beartype")


def pytest_addoption(parser: pytest.Parser) -> None:
    """How many random combinations `tests/fuzz` tries; a few that are always the same where it is not said."""
    parser.addoption("--examples", type=int, default=None, help="random combinations that tests/fuzz tries")


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer of whole words, saved."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    import tiny

    path = tmp_path_factory.mktemp("model")
    tiny.llama(dtype=torch.float32).save_pretrained(path)
    words = ["<s>", "<unk>", *(f"w{i}" for i in range(tiny.VOCABULARY - 2))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>").save_pretrained(path)
    return path
