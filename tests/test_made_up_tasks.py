"""Tasks that are made up, or cut from plain text: what they ask, and how long they are."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path

import pytest

from focusllm import evaluation
from focusllm.documents.text import encode_ids, frame_ids
from focusllm.errors import ConfigError, DocumentError
from focusllm.evaluation import example as example_module
from focusllm.evaluation import tasks
from focusllm.evaluation.example import LengthError, Setting

MADE_UP = ["passkey", "passkey-paper", "needle", "document", "number-string", "key-value", "math-find"]


@pytest.mark.parametrize("name", MADE_UP)
def test_made_up_tasks_fill_their_length(name: str, setting: Setting) -> None:
    task = tasks.get(name)
    frame = sum(map(len, frame_ids(setting.tokenizer)))
    for length in (1200, 3000):
        examples = list(task.examples(length, 12, setting))
        assert len({example.id for example in examples}) == 12
        assert examples == list(task.examples(length, 12, setting))
        for example in examples:
            taken = sum(len(encode_ids(setting.tokenizer, part)) for part in (example.before, example.context))
            taken += len(encode_ids(setting.tokenizer, example.after)) + example.max_new_tokens + frame
            assert length - 120 <= taken <= length
            assert task.score(f" {example.references[0]} ", example) == 1
            assert task.score("nothing", example) == 0
            if name not in ("math-find",):
                assert example.references[0] in example.context
    assert examples != list(task.examples(3000, 12, dataclasses.replace(setting, seed=1)))


@pytest.mark.parametrize("name", ["passkey", "passkey-paper", "needle", "number-string", "key-value"])
def test_depths_go_from_the_beginning_to_the_end(name: str, setting: Setting) -> None:
    examples = list(tasks.get(name).examples(5000, 20, setting))
    for example in examples:
        place = example.context.index(example.references[0]) / len(example.context)
        assert place == pytest.approx(example.meta["depth"], abs=0.05)
    assert {example.meta["depth"] for example in examples} >= {0.0, 1.0}


def test_the_authors_passkey_has_the_task_beside_the_question(setting: Setting) -> None:
    task = tasks.get("passkey-paper")
    for example in task.examples(3000, 10, setting):
        (key,) = example.references
        assert 1 <= int(key) < 50_000
        assert example.max_new_tokens == setting.num_tokens(f" {key}")
        front, line, behind = example.context.partition(
            f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
        )
        assert line
        sentences = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
        for text in (front, behind):
            assert " ".join([sentences] * 40).startswith(text)
        assert len(front) / len(front + behind) == pytest.approx(example.meta["depth"], abs=0.01)
        assert example.after.startswith("\nThere is an important info")
        assert example.after.endswith("What is the pass key? The pass key is")
        assert task.score(f" {key}", example) == 1
        assert task.score(f"{key}0", example) == 0


def test_math_find_answers_are_right(setting: Setting) -> None:
    answers = set()
    for example in tasks.get("math-find").examples(2000, 12, setting):
        numbers = sorted(json.loads(example.context))
        kind = example.meta["dataset"]
        place = {"largest": -1, "second largest": -2, "third largest": -3, "smallest": 0, "second smallest": 1}
        expected = sorted(set(numbers))[place[kind]] if kind in place else numbers[len(numbers) // 2]
        assert str(expected) == example.references[0]
        answers.add(expected)
    assert len(answers) == 12  # none can be known without the list


def test_a_document_is_the_same_for_all_its_questions(setting: Setting) -> None:
    examples = list(tasks.get("document").examples(3000, 5, setting))
    assert len({example.context for example in examples}) == 1
    assert len({example.after for example in examples}) == 5
    assert all(example.references[0] in example.context for example in examples)


@pytest.mark.parametrize("name", ["perplexity", "sliding-perplexity"])
def test_perplexity_has_the_same_labels_at_all_lengths(name: str, setting: Setting) -> None:
    setting = dataclasses.replace(setting, lengths=(400, 3000, 1_000_000))  # the last is longer than any document
    by_length = [list(tasks.get(name).examples(length, 7, setting)) for length in (400, 3000)]
    for short, long in zip(*by_length, strict=True):
        assert short.id == long.id
        assert len(short.text_ids) == 400
        assert long.text_ids[-400:] == short.text_ids
    assert len(by_length[0]) == 7
    with pytest.raises(LengthError, match="no document"):
        list(tasks.get(name).examples(1_000_000, 1, setting))


def test_documents_of_few_characters_may_have_many_tokens(setting: Setting, tmp_path: Path) -> None:
    (tmp_path / "emoji.txt").write_text("🐳" * 150)
    found = dataclasses.replace(setting, text=str(tmp_path / "emoji.txt")).documents(500)
    assert [len(ids) for _, ids in found] == [600]


def test_sliding_windows_label_every_token_once(setting: Setting) -> None:
    found = list(tasks.get("sliding-perplexity").examples(700, 6, setting))
    assert [example.id.split("-")[0] for example in found] == ["0", "1", "2"] * 2  # the documents take turns
    first, second = found[0], found[3]
    assert second.text_ids[: 700 - 256] == first.text_ids[256:]
    assert first.labels == second.labels == 256


def test_lost_in_the_middle_reads_the_original_files(setting: Setting, tmp_path: Path) -> None:
    folder = tmp_path / "lost_in_the_middle"
    folder.mkdir()
    row = json.dumps({"ordered_kv_records": [[f"k{i}", f"v{i}"] for i in range(75)], "key": "k0", "value": "v0"})
    damaged = '{"ordered_kv_records": []}\n\n{"ordered'
    (folder / "kv-retrieval-75_keys.jsonl").write_text(f"{row}\n" * 2 + f"{damaged}\n{row}\n")
    examples = list(tasks.get("lost-in-the-middle-75").examples(None, 3, setting))
    assert {example.max_new_tokens for example in examples} == {100}
    assert {example.references for example in examples} == {("v0",)}
    for example, place in zip(examples, (0, 37, 74), strict=True):  # the pair moves, the others keep their order
        keys = list(json.loads(example.context))
        assert keys.index("k0") == place
        assert [key for key in keys if key != "k0"] == [f"k{i}" for i in range(1, 75)]
    plain = folder / "kv-retrieval-75_keys.jsonl"
    (folder / "kv-retrieval-140_keys.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))  # as it is published
    packed = list(tasks.get("lost-in-the-middle-140").examples(None, 3, setting))
    assert [example.context for example in packed] == [example.context for example in examples]
    assert setting.notes
    with pytest.raises(DocumentError, match="no lost_in_the_middle"):
        list(tasks.get("lost-in-the-middle-75").examples(None, 3, dataclasses.replace(setting, data=tmp_path / "text")))


def test_a_short_haystack_goes_round(setting: Setting, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("0123456789")
    haystack = dataclasses.replace(setting, text=str(tmp_path / "short.txt")).haystack
    assert haystack.cut(8, 4) == "89\n\n01"
    assert haystack.cut(3, 7) == "3456789"
    assert haystack.cut(5, 30_000).count("0123456789") == 2999  # thousands of rounds


def test_a_haystack_is_no_longer_than_needed(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example_module, "HAYSTACK_CHARACTERS", 1000)
    assert setting.haystack.num_tokens == 1000


def test_a_length_without_room_is_refused(setting: Setting) -> None:
    for name in MADE_UP:
        with pytest.raises(ConfigError, match="use a length above"):
            list(tasks.get(name).examples(60, 1, setting))
    least = next(length for length in range(60, 400) if _has_room("math-find", length, setting))
    with pytest.raises(ConfigError, match="has room for 0 numbers; use a length that has for 3"):
        list(tasks.get("math-find").examples(least, 1, setting))


def _has_room(name: str, length: int, setting: Setting) -> bool:
    try:
        list(tasks.get(name).examples(length, 1, setting))
    except ConfigError as error:
        return "use a length above" not in str(error)
    return True


def test_the_shortest_files_are_short() -> None:
    folder = Path(evaluation.__file__).parent
    for kind in ("methods", "tasks"):
        files = [path for path in (folder / kind).glob("*.py") if path.name != "__init__.py"]
        assert min(len(path.read_text().splitlines()) for path in files) < 60
