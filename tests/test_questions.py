"""Questions that a model makes of passages: which are kept, going on after a stop, and that they are trained on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import byte_tokenizer
from focusllm import DocumentError, TrainConfig, TrainingError, train
from focusllm.errors import ConfigError
from focusllm.training import questions as place
from focusllm.training.config import Source
from focusllm.training.questions import make_questions
from focusllm.training.tasks import read_questions, says

TEXT = "".join(f"It was cold. The keeper gave Tom Falk {i} coins in all, and then he left. " for i in range(100, 400))
ROWS = [
    {"passage": f"Some say {w} lives in {t}. Others do not.", "question": f"Where does {w} live?", "answer": t}
    for w, t in (("Ada", "Riga"), ("Nils", "Cork"), ("Olga", "Turin"))
]


class Made:
    """A model's place: it makes a question of every passage, and answers it as it is told to."""

    def __init__(self, knows: bool = False, reads: bool = True, asks: str = "How many were given?"):
        self.knows, self.reads, self.asks, self.tokenizer = knows, reads, asks, byte_tokenizer()
        self.calls = 0

    def __call__(self, model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], *_: Any) -> list[Any]:
        self.calls += 1
        texts = [tokenizer.decode(prompt) for prompt in prompts]
        said = [self.asks if "whose answer is" in text else self.answer(text) for text in texts]
        return [(tokenizer(text).input_ids, torch.empty(0)) for text in said]

    def answer(self, text: str) -> str:
        has_passage = "coins" in text
        return text if (has_passage and self.reads) or (not has_passage and self.knows) else "I do not know."


@pytest.fixture
def made(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`make_questions` with a model whose answers are given."""
    monkeypatch.setenv("FOCUSLLM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text(TEXT)

    def make(answers: Any, count: int = 16, **changes: Any) -> Any:
        monkeypatch.setattr(place, "answers_to", answers)
        given = {"output": tmp_path / "made.jsonl", "model": str(base / "model"), "count": count}
        return make_questions([Source(str(tmp_path / "text.txt"))], **(given | changes))

    return make


def test_kept_are_those_that_need_the_passage(made: Callable[..., Any], tmp_path: Path) -> None:
    result = made(Made())
    assert (result.tried, result.asked, result.kept) == (16, 16, 16)
    for row in map(json.loads, (tmp_path / "made.jsonl").read_text().splitlines()):
        assert row["question"] == "How many were given?"
        assert says(row["passage"], row["answer"])
        assert row["passage"] in TEXT
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "made.jsonl", "text.txt"]


@pytest.mark.parametrize(
    ("answers", "asked"),
    [
        (Made(reads=False), 16),
        (Made(asks="I will not ask."), 0),
        (Made(asks="Is it Tom Falk, or Falk, or Tom, or cold?"), None),
    ],
)
def test_where_all_fail_nothing_is_written(
    made: Callable[..., Any], tmp_path: Path, answers: Made, asked: int | None
) -> None:
    if asked is None:  # those about a number remain, the others say their own answer
        assert made(answers).asked < 16
        return
    with pytest.raises(TrainingError, match=rf"^none of 16 questions passed the check \({asked} were questions; .*\.$"):
        made(answers)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "text.txt"]


def test_what_is_known_without_the_passage_is_left_out(made: Callable[..., Any]) -> None:
    knows = Made(knows=True)
    knows.answer = lambda text: TEXT  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="none of 16 questions"):
        made(knows)


def test_goes_on_where_it_stopped(made: Callable[..., Any], tmp_path: Path) -> None:
    whole = made(Made(), count=24, output=tmp_path / "whole.jsonl")

    class Stopped(Made):
        def __call__(self, *given: Any) -> list[Any]:
            if self.calls == 3:
                raise KeyboardInterrupt
            return super().__call__(*given)

    with pytest.raises(KeyboardInterrupt):
        made(Stopped(), count=24)
    assert not (tmp_path / "made.jsonl").exists()
    answers = Made()
    result = made(answers, count=24)
    assert answers.calls == 4  # two batches of three
    assert (tmp_path / "made.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert result.kept == whole.kept == 24


def test_a_real_model_through_the_command(
    focusllm: Callable[..., tuple[int, str, str]], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A random one makes no question, which is one sentence and an exit code."""
    monkeypatch.setenv("FOCUSLLM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text(TEXT)
    output = tmp_path / "made.jsonl"
    code, _, error = focusllm("questions", tmp_path / "text.txt", "-m", base / "model", "-o", output, "-n", 8)
    assert code == 2
    assert "none of 8 questions passed the check" in error
    assert "Traceback" not in error
    assert not output.exists()
    (tmp_path / "text.txt").write_text("nothing to ask for here.\nnothing at all.\n" * 50)
    code, _, error = focusllm("questions", tmp_path / "text.txt", "-m", base / "model", "-o", output, "-n", 8)
    assert code == 2
    assert "no names or numbers" in error


def test_they_are_trained_on(train_settings: Callable[..., TrainConfig], tmp_path: Path) -> None:
    path = tmp_path / "made.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    tasks = read_questions([path])
    assert [task.inserts for task in tasks] == [[row["passage"]] for row in ROWS]
    config = train_settings(
        objective="distill", objectives={"questions": 1.0}, questions=[str(path)], steps=1, teacher_lengths=[96],
        evaluation_memories=1, memories_per_step=1,
    )  # fmt: skip
    seen: list[dict[str, Any]] = []
    train(config, tmp_path / "out", report=seen.append)
    names = {name for entry in seen if "loss" in entry for name in entry["objectives"]}
    assert any(name.startswith("questions") for name in names)
    path.write_text(json.dumps(ROWS[0]) + "\n" + json.dumps({**ROWS[1], "answer": "York"}) + "\n")
    with pytest.raises(TrainingError, match="was made with another content of"):
        train(config, tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no questions; make some with"),
        ("nonsense\n", "is not a file of `focusllm questions`"),
        ('{"question": "Who?"}\n', "is not a file of `focusllm questions`"),
        ('{"passage": "x", "question": 3, "answer": "y"}\n', "has no questions"),
    ],
)
def test_files_that_are_none(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "made.jsonl").write_text(content)
    with pytest.raises(DocumentError, match=message):
        read_questions([tmp_path / "made.jsonl"])
    with pytest.raises(ConfigError, match="there are no sources"):
        make_questions([], tmp_path / "out.jsonl")
