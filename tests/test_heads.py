"""Look-up heads: how they are found, and that a file of another model is not taken."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from conftest import build, byte_tokenizer
from focusllm import FocusForCausalLM, FocusLLM, ModelError
from focusllm.checks import heads as module
from focusllm.checks.needles import needles
from focusllm.huggingface.embedded import MODELS, boxed_heads
from focusllm.huggingface.head_files import HEADS_NAME, known_heads, load_heads, save_heads
from focusllm.memory.lookup import Heads, middle_heads

HEADS = Heads(((0, 1), (2, 3)), (0, 1))


def test_needles_are_told_apart() -> None:
    found = needles(np.random.default_rng(0), 40)
    assert len({needle.question for needle in found}) == 40
    assert all(needle.answer.lower() in needle.statement.lower() for needle in found)
    assert not any(needle.answer in needle.question for needle in found)
    assert found == needles(np.random.default_rng(0), 40)


def test_every_fact_is_in_its_chunk_alone() -> None:
    tokenizer = byte_tokenizer()
    hidden = needles(np.random.default_rng(0), 8)
    rows, right = module._hide(hidden, tokenizer, 1024)
    assert {len(row) for row in rows} == {1024}
    texts = [tokenizer.decode(row) for row in rows]
    for needle, place in zip(hidden, right, strict=True):
        assert [needle.statement in text for text in texts] == [i == place for i in range(len(texts))]
    with pytest.raises(ModelError, match="chunks of 64 tokens have no room"):
        module._hide(hidden, tokenizer, 64)


def test_the_head_that_looks_up_is_found() -> None:
    """One head pays the right chunk more than others do, one always the first, the rest at random."""
    generator, right = torch.Generator().manual_seed(0), torch.arange(24) // 2 % 6
    paid = 0.02 * torch.rand(24, 12, 6, generator=generator)
    paid[torch.arange(24), 7, right] += 0.2
    paid[:, 3, 0] += 0.5
    assert module._best(paid, right, 1) == ([7], 1.0, 1.0)
    assert module._recall(paid.mean(1), right, 1) < 0.5


def test_heads_of_a_tiny_model(llama: nn.Module) -> None:
    steps: list[tuple[int, int]] = []
    found = module.find_heads(llama, byte_tokenizer(), 4, 1024, 2, lambda *step: steps.append(step))
    assert len(found.heads.pairs) == 2
    assert (found.num_questions, found.num_chunks) == (2, 2)
    assert steps[-1] == (14, 14)
    with pytest.raises(ModelError, match="num_heads is 99, but the model has 12 heads"):
        module.find_heads(llama, byte_tokenizer(), 4, num_heads=99)


def test_middle_heads_of_any_model(llama: nn.Module) -> None:
    found = middle_heads(llama)
    assert found.layers == {0}  # of three
    assert len(found.key_heads) == 2
    assert middle_heads(build(num_hidden_layers=16)).layers == set(range(4, 10))


def test_saved_with_the_model(tmp_path: Path) -> None:
    model = FocusForCausalLM(build())
    model.found_heads = HEADS
    model.save_pretrained(tmp_path)
    assert FocusForCausalLM.from_pretrained(tmp_path).lookup_heads == HEADS
    model.found_heads = None
    model.save_pretrained(tmp_path)
    assert not (tmp_path / HEADS_NAME).exists()
    assert FocusForCausalLM.from_pretrained(tmp_path).lookup_heads == middle_heads(model.base)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": {"model_type": "mistral"}}, "are of another model"),
        ({"heads": [[9, 0]]}, "are of another model"),
        ({"heads": []}, "are of another model"),
        ({"heads": "x"}, "has no look-up heads"),
        (None, "has no look-up heads"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, llama: nn.Module, change: dict | None, message: str) -> None:
    path = tmp_path / HEADS_NAME
    save_heads(llama, HEADS, path)
    assert load_heads(llama, path) == HEADS
    path.write_text("{" if change is None else json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ModelError, match=message) as error:
        load_heads(llama, path)
    assert "\n" not in str(error.value)
    said: list[str] = []
    assert known_heads(llama, "any", tmp_path, said.append) is None  # said, and others are used
    assert said == [str(error.value)]


def test_the_command(focusllm, model_folder: Path) -> None:
    code, out, err = focusllm("heads", model_folder, "--questions", 8, "--json")
    assert code == 0, err
    said = json.loads(out)
    assert code == 0
    assert said["file"] == str(model_folder / HEADS_NAME)
    assert len(said["heads"]) == 8
    loaded = FocusLLM.from_pretrained(model_folder)
    assert [list(pair) for pair in loaded.model.lookup_heads.pairs] == said["heads"]


def test_a_place_that_cannot_be_written_is_refused_at_once(
    focusllm, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("focusllm.checks.heads.find_heads", lambda *_, **__: pytest.fail("minutes were spent"))
    code, out, err = focusllm("heads", model_folder, "-o", tmp_path / "file" / "heads.json")
    assert (code, out) == (2, "")
    assert "cannot be written" in err
    assert "--output" in err
    assert "Traceback" not in err


def test_heads_in_the_package_belong_to_its_models() -> None:
    """Found by our aliases and by the hub's names; a folder of that name is somebody else's model."""
    for model in MODELS.values():
        path = boxed_heads(model.alias)
        assert path is not None
        assert boxed_heads(model.hub_id) == path
        assert len(json.loads(path.read_text())["heads"]) == 8
    assert boxed_heads("somebody/else") is None
