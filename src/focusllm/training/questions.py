"""Questions that a base model makes of passages of text, kept if it answers them with the passage and not without.

    a passage, and a name or a number in it  ->  "what question is answered by it?"  ->  question
    the question with the passage            ->  says it         } both: kept, as {"passage", "question", "answer"}
    the question alone                       ->  does not say it }

Passages are a function of the seed and the number of the batch, and each batch is a file beside the output until all
are done: what was stopped goes on. Of a source, what a training may keep to evaluate on is left out.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from focusllm.documents.text import encode_ids, frame_question
from focusllm.errors import ConfigError, DocumentError, TrainingError
from focusllm.files import remove_folder, remove_parts, whole_file, writing_to
from focusllm.huggingface.embedded import cache_folder
from focusllm.json_text import parse_json
from focusllm.training.config import Source
from focusllm.training.corpus import Corpus, load_corpus
from focusllm.training.generating import BATCH, answers_to
from focusllm.training.run import load_base
from focusllm.training.sampling import by_length
from focusllm.training.tasks import says

LENGTHS = (96, 192, 320)
"""Tokens of a passage, before it is cut to whole sentences."""
LONGEST_QUESTION = 48
LONGEST_ANSWER = 32
ASK = 'Write one short question about this text whose answer is "{answer}". The question must not contain the answer.'
SPAN = re.compile(r"(?<=[\w,;] )[A-Z][a-z]+(?: [A-Z][a-z]+)*|\b\d[\d,.:]*\d\b|\b\d+\b|\b[a-z]+_[a-z_]+\b")
"""What can be asked for: names that do not begin a sentence, numbers, names in code."""

Rng = np.random.Generator


@dataclass(frozen=True)
class Made:
    """What came of it: questions that were asked for, that were one, and that passed the check."""

    path: Path
    tried: int
    asked: int
    kept: int


def make_questions(
    sources: Sequence[Source],
    output: Path,
    model: str = "smollm2-135m",
    count: int = 1024,
    seed: int = 0,
    dtype: str = "auto",
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
    reading: Callable[[str, int], None] = lambda *_: None,
    notify: Callable[[str], None] = lambda _: None,
) -> Made:
    """Make questions of the passages of sources and write those that pass the check into a file, JSON lines.

    Args:
        count: passages that are tried.
        progress: called with (passages done, passages in all).

    Raises:
        TrainingError: none passes; nothing is written.
        ConfigError, DocumentError, ModelError: sources or a model that cannot work; FocusError: a full disk.
    """
    if not sources:
        raise ConfigError("there are no sources; name at least one folder, file or dataset with text.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer, base = load_base(model, dtype, device, notify)
    base.to(device)
    loaded = [
        (load_corpus(source, tokenizer, cache_folder() / "corpora", reading), source.weight) for source in sources
    ]
    corpora = [(corpus.split()[0], weight) for corpus, weight in loaded]
    said = [model, dtype, seed, [(corpus.digest, weight) for corpus, weight in loaded]]
    parts = output.with_name(f"{output.name}.{hashlib.sha256(repr(said).encode()).hexdigest()[:8]}.parts")
    files, found = [], list[dict[str, Any]]()
    with writing_to(output, "make room and run the same command again to go on"):
        parts.mkdir(parents=True, exist_ok=True)
        remove_parts(parts)
    for number in range(-(-count // BATCH)):
        files.append(parts / f"{number:06d}.json")
        if not files[-1].exists():
            batch = _batch(base, tokenizer, corpora, np.random.default_rng([seed, number]))
            with (
                writing_to(files[-1], "make room and run the same command again to go on"),
                whole_file(files[-1]) as new,
            ):
                new.write_text(json.dumps(batch))
        found.append(parse_json(files[-1].read_bytes()))
        progress(min(count, (number + 1) * BATCH), count)
    kept = [row for batch in found for row in batch["kept"]]
    tried, asked = (sum(batch[name] for batch in found) for name in ("tried", "asked"))
    if not kept:
        remove_folder(parts)
        raise TrainingError(
            f"none of {tried} questions passed the check ({asked} were questions; {model} must answer them right with "
            f"the passage and not without); nothing was written. Try more passages, or another model."
        )
    with writing_to(output, "make room and run the same command again to go on"), whole_file(output) as new:
        new.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), encoding="utf-8")
    remove_folder(parts)
    return Made(output, tried, asked, len(kept))


def _batch(model: nn.Module, tokenizer: Any, corpora: Sequence[tuple[Corpus, float]], rng: Rng) -> dict[str, Any]:
    """The questions of some passages: how many were tried, how many were questions, and those that are kept."""
    passages = [_passage(rng, tokenizer, corpora) for _ in range(BATCH)]
    asked = [_asked(tokenizer, passage, ASK.format(answer=answer)) for passage, answer in passages]
    questions = [_question(text) for text in _texts(model, tokenizer, asked, LONGEST_QUESTION)]
    rows = [
        {"passage": passage, "question": question, "answer": answer}
        for (passage, answer), question in zip(passages, questions, strict=True)
        if question and not says(question, answer)
    ]
    prompts = [_asked(tokenizer, given, row["question"]) for row in rows for given in (row["passage"], "")]
    texts = _texts(model, tokenizer, prompts, LONGEST_ANSWER)
    both = zip(rows, texts[::2], texts[1::2], strict=True)
    kept = [row for row, with_it, without in both if says(with_it, row["answer"]) and not says(without, row["answer"])]
    return {"tried": len(passages), "asked": len(rows), "kept": kept}


def _passage(rng: Rng, tokenizer: Any, corpora: Sequence[tuple[Corpus, float]]) -> tuple[str, str]:
    """Whole sentences of a text, and what in them is to be asked for.

    Raises:
        DocumentError: many draws have nothing in them to ask for.
    """
    weights = np.array([weight for _, weight in corpora])
    for _ in range(200):
        corpus, _ = corpora[int(rng.choice(len(weights), p=weights / weights.sum()))]
        if (corpus.answers >= 0).all():  # prompts with answers
            continue
        tokens = corpus.document(by_length(rng, corpus, corpus.answers < 0))
        length = min(int(rng.choice(LENGTHS)), len(tokens))
        start = int(rng.integers(len(tokens) - length + 1))
        text = re.search(r"(?<=[.!?\n])\s.*[.!?\n]", tokenizer.decode(tokens[start : start + length]), re.DOTALL)
        spans = sorted(set(SPAN.findall(text[0]))) if text else []
        if text and spans:
            return text[0].strip(), spans[int(rng.integers(len(spans)))]
    raise DocumentError("the sources have no names or numbers in whole sentences to ask for; give other texts.")


def _asked(tokenizer: Any, passage: str, question: str) -> list[int]:
    """The token ids of a question behind a passage, in the chat template."""
    before, asked = frame_question(tokenizer, question)
    return [*before, *encode_ids(tokenizer, passage), *asked]


def _texts(model: nn.Module, tokenizer: Any, prompts: Sequence[list[int]], most: int) -> list[str]:
    made = answers_to(model, tokenizer, prompts, most)
    return [tokenizer.decode(answer, skip_special_tokens=True) for answer, _ in made]


def _question(text: str) -> str:
    """The first line that is a question; empty: there is none."""
    lines = (line.strip().removeprefix("Question:").strip(' "*') for line in text.splitlines())
    return next((line for line in lines if line.endswith("?")), "")
