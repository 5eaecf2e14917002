"""Files of look-up heads: beside a saved model, in the cache for any other, in this package for ours."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from focusllm.errors import ModelError, first_line
from focusllm.files import whole_file
from focusllm.huggingface.adapter_files import fingerprint
from focusllm.huggingface.embedded import boxed_heads, cache_folder
from focusllm.json_text import parse_json
from focusllm.memory.lookup import Heads, choosing_layers
from focusllm.method.base import layout

HEADS_NAME = "lookup_heads.json"


def save_heads(model: nn.Module, heads: Heads, path: Path, found: dict[str, Any] | None = None) -> None:
    """Write look-up heads with what they belong to.

    Args:
        found: how they were found, to be kept with them.
    """
    content = {"format": 1, "base": fingerprint(model), "heads": heads.pairs, "found": found or {}}
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as part:
        part.write_text(json.dumps(content, indent=2) + "\n")


def load_heads(model: nn.Module, path: Path) -> Heads:
    """Read look-up heads.

    Raises:
        ModelError: the file is damaged, or of another model.
    """
    shape = layout(model)
    try:
        content = parse_json(path.read_text())
        pairs = tuple((int(layer), int(head)) for layer, head in content["heads"])
        base = content["base"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} has no look-up heads ({first_line(error)}); find them anew.") from error
    able = {(i, head) for i in choosing_layers(model) for head in range(shape.layers[i].num_heads)}
    if base != fingerprint(model) or not pairs or not able.issuperset(pairs):
        raise ModelError(
            f"the look-up heads in {path} are of another model ({base}), not of this one ({fingerprint(model)}); find "
            f"them with focusllm heads."
        )
    return Heads.of(model, pairs)


def cached_path(model: nn.Module, name: str) -> Path:
    """Where the heads of a model go that has no folder of its own."""
    digest = hashlib.sha256(json.dumps([name, fingerprint(model)], sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder() / "heads" / f"{digest}.json"


def known_heads(
    model: nn.Module, name: str, folder: Path, notify: Callable[[str], None] = lambda _: None
) -> Heads | None:
    """The look-up heads of a model, from its folder, the cache or this package; None: they were not looked for yet.

    Args:
        name: the model, as it was asked for. folder: where it, or what was saved with it, lies.
        notify: told of a file that is damaged or of another model; it is not used.
    """
    for path in (folder / HEADS_NAME, cached_path(model, name), boxed_heads(name)):
        if path is not None and os.path.isfile(path):
            try:
                return load_heads(model, path)
            except ModelError as error:
                notify(str(error))
    return None
