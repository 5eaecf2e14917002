"""Retrieval tasks that are made up: something is hidden in a long text, and asked for.

A task gives `inserts` (text to be put somewhere into the memory, in order), a `question`, the `lead` with which the
answer begins, and the `answer`. Pure functions of a random generator; no tokenizer, no files but those with questions.
The wordings are deliberately not those of the tasks that the method is evaluated on.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from focusllm.errors import DocumentError
from focusllm.files import open_text
from focusllm.json_text import parse_json
from focusllm.training.wordings import (
    ATTRIBUTES,
    BELONGINGS,
    EVENTS,
    IDENTIFIERS,
    LEADS,
    LOOKUPS,
    QUESTIONS,
    STATEMENTS,
    TABLES,
    WORDS,
    Rng,
    name,
    pick,
    subject,
)


@dataclass(frozen=True)
class Task:
    """Something hidden, and the question about it."""

    inserts: list[str]
    """Texts for the memory: each is put somewhere, in this order."""
    question: str
    lead: str
    """The beginning of the answer that is given with the question, for texts without a chat template; may be empty."""
    answer: str


def fact(rng: Rng) -> Task:
    """One sentence that says a number, a word or a date of somebody or something, or what somebody did."""
    if rng.random() < 0.4:
        return _event(rng)
    who = subject(rng)
    kind = pick(rng, tuple(ATTRIBUTES))
    attributes, value_of = ATTRIBUTES[kind]
    attribute, value = pick(rng, attributes), value_of(rng)
    statement = pick(rng, STATEMENTS).format(a=attribute, s=who, v=value)
    question = pick(rng, QUESTIONS).format(a=attribute, s=who)
    lead = pick(rng, LEADS).format(a=attribute, s=who)
    return Task([statement], question, lead, value)


def _event(rng: Rng) -> Task:
    statements, questions, lead, value_of = pick(rng, EVENTS)
    words = {"s": name(rng), "t": f"{pick(rng, WORDS)} {pick(rng, BELONGINGS)}", "v": value_of(rng)}
    statement, question = pick(rng, statements), pick(rng, questions)
    return Task([statement.format(**words)], question.format(**words), lead.format(**words), words["v"])


def table(rng: Rng, most_rows: int = 100) -> Task:
    """A table of identifiers, more often a short one than a long one; one of them is looked up."""
    rows = 3 + round((most_rows - 3) * rng.random() ** 2)
    make_key, make_value = pick(rng, IDENTIFIERS), pick(rng, IDENTIFIERS)
    keys = list(dict.fromkeys(make_key(rng) for _ in range(rows)))
    values = [make_value(rng) for _ in keys]
    title, line, lead = pick(rng, TABLES)
    chosen = int(rng.integers(len(keys)))
    body = "\n".join(line.format(k=key, v=value) for key, value in zip(keys, values, strict=True))
    question = pick(rng, LOOKUPS).format(k=keys[chosen])
    return Task([f"{title}\n{body}\n"], question, lead.format(k=keys[chosen]), values[chosen])


class Questions:
    """Questions from files, of which one in fifty is kept from training, of fewer the last; one alone is in both parts.

    Args:
        tasks: all of them.
        part: `train` or `held out`.
    """

    def __init__(self, tasks: list[Task], part: str):
        kept = {i for i in range(len(tasks)) if i % 50 == 49} or {len(tasks) - 1}
        chosen = {"train": [t for i, t in enumerate(tasks) if i not in kept], "held out": [tasks[i] for i in kept]}
        self.tasks = chosen[part] or tasks

    def __call__(self, rng: Rng) -> Task:
        """One of them."""
        return self.tasks[int(rng.integers(len(self.tasks)))]


def read_stories(paths: Sequence[str | Path]) -> list[Task]:
    """BAbI stories (Weston et al., arXiv 1502.05698): the facts before a question, to be hidden one by one.

    Raises:
        DocumentError: a file that cannot be read, is not in bAbI's format, or has no questions.
    """
    tasks: list[Task] = []
    for path in paths:
        facts: list[str] = []
        before = len(tasks)
        for number, line in enumerate(_text(path).splitlines(), 1):
            match = re.fullmatch(r"(\d+) (.*)", line)
            if match is None:
                raise DocumentError(f"{path}, line {number} does not begin with a number; give files in bAbI's format.")
            if match[1] == "1":
                facts = []
            question, *rest = re.split(r"[\t|]", match[2])  # some copies have bars for tabs
            if rest:
                tasks.append(Task(facts, question.strip(), "", rest[0].strip().replace(",", ", ")))
            else:
                facts = [*facts, question.strip()]
        if len(tasks) == before:
            raise DocumentError(f"{path} has no questions; give files in bAbI's format.")
    return tasks


def read_multihop(paths: Sequence[str | Path]) -> list[Task]:
    """HotpotQA and MuSiQue questions (JSON or JSON lines) with their paragraphs, up to four of them distractors.

    Raises:
        DocumentError: a file that cannot be read, is neither, or has no questions.
    """
    tasks: list[Task] = []
    for path in paths:
        text = _text(path)
        try:
            lines = (line for line in text.split("\n") if line.strip())
            rows = parse_json(text) if text.lstrip().startswith("[") else map(parse_json, lines)
            found = [_multihop(row) for row in rows]
        except (ValueError, KeyError, TypeError) as error:
            raise DocumentError(f"{path} is not in HotpotQA's or MuSiQue's format ({error!r}).") from error
        if not found:
            raise DocumentError(f"{path} has no questions; give files in HotpotQA's or MuSiQue's format.")
        tasks += found
    return tasks


def _multihop(row: dict[str, Any]) -> Task:
    if "paragraphs" in row:
        given = [(p["is_supporting"], f"{p['title']}\n{p['paragraph_text']}") for p in row["paragraphs"]]
    else:
        needed = {title for title, _ in row["supporting_facts"]}
        given = [(title in needed, f"{title}\n{''.join(sentences)}") for title, sentences in row["context"]]
    distractors = [i for i, (need, _) in enumerate(given) if not need][4:]
    inserts = [text for i, (_, text) in enumerate(given) if i not in distractors]
    return Task(inserts, row["question"], "Answer:", row["answer"])


def read_questions(paths: Sequence[str | Path]) -> list[Task]:
    """Questions that a model made from passages (`focusllm questions`), and their passages.

    Raises:
        DocumentError: a file that cannot be read, is not of that kind, or has no questions.
    """
    tasks: list[Task] = []
    for path in paths:
        lines = [line for line in _text(path).split("\n") if line.strip()]
        try:
            rows = [parse_json(line) for line in lines]
            found = [Task([row["passage"]], row["question"], "", row["answer"]) for row in rows]
        except (ValueError, KeyError, TypeError) as error:
            raise DocumentError(f"{path} is not a file of `focusllm questions` ({error!r}).") from error
        if not found or not all(
            isinstance(x, str) for task in found for x in (*task.inserts, task.question, task.answer)
        ):
            raise DocumentError(f"{path} has no questions; make some with `focusllm questions`.")
        tasks += found
    return tasks


def says(text: str, answer: str) -> bool:
    """Whether a text has an answer in it, as whole words, whatever their case and the white space between them."""
    wanted = r"\s+".join(map(re.escape, answer.strip(" .").split()))
    return bool(wanted) and re.search(rf"(?<!\w){wanted}(?!\w)", text, re.IGNORECASE) is not None


def _text(path: str | Path) -> str:
    try:
        with open_text(path) as file:
            return file.read()
    except OSError as error:
        raise DocumentError(f"{path} cannot be read ({error.strerror or error}); check the path.") from error
    except ValueError as error:
        raise DocumentError(f"{path} cannot be read ({error}); give a file in UTF-8.") from error
