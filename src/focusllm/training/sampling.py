"""From text to samples: which memory, which local contexts, which answers.

    memory:  n tokens of a document, with the facts of tasks put in between  -->  R chunks
    samples: continuation   the text behind the memory
             repetition     a passage from inside the memory, once more
             tasks          text behind the memory, then a question about what is hidden in it

Everything is a function of (settings, seed, step, number in the step): there is no state, so a training that goes on
after a stop sees exactly what it would have seen.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from focusllm.errors import ConfigError, DocumentError
from focusllm.text import chat_frame, encode_text
from focusllm.training.config import TASK_OBJECTIVES, TrainConfig
from focusllm.training.corpus import Corpus
from focusllm.training.dense import Sample
from focusllm.training.tasks import Stories, Task, fact, table

Rng = np.random.Generator


@dataclass(frozen=True, eq=False)
class Memory:
    """One memory and the samples that are decoded from it: `chunks` [R, C] token ids."""

    chunks: np.ndarray
    samples: list[Sample]
    origin: str
    """Where it is from, for messages."""


class Multihop:
    """HotpotQA and MuSiQue questions with their paragraphs, some of them distractors.

    Raises:
        DocumentError: a file that is neither.
    """

    def __init__(self, paths: Sequence[str]):
        self.rows: list[tuple[list[str], list[str], str, str]] = []
        for path in paths:
            try:
                self.rows += [self._read(row) for row in json.loads(Path(path).read_text(encoding="utf-8"))]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise DocumentError(f"{path} is not in HotpotQA's or MuSiQue's format ({error!r}).") from error

    @staticmethod
    def _read(row: dict[str, Any]) -> tuple[list[str], list[str], str, str]:
        if "paragraphs" in row:
            given = [(p["is_supporting"], f"{p['title']}\n{p['paragraph_text']}") for p in row["paragraphs"]]
        else:
            needed = {title for title, _ in row["supporting_facts"]}
            given = [(title in needed, f"{title}\n{''.join(sentences)}") for title, sentences in row["context"]]
        return [p for need, p in given if need], [p for need, p in given if not need], row["question"], row["answer"]

    def __call__(self, rng: Rng) -> Task:
        """A question with its paragraphs and up to four others, in any order."""
        needed, others, question, answer = self.rows[int(rng.integers(len(self.rows)))]
        chosen = [others[i] for i in rng.permutation(len(others))[: int(rng.integers(0, 5))]]
        inserts = [*needed, *chosen]
        return Task([inserts[i] for i in rng.permutation(len(inserts))], question, "Answer:", answer)


class Sampler:
    """Draws memories with their samples.

    Args:
        corpora: with their weights.

    Raises:
        DocumentError: no document is as long as one sample.
    """

    def __init__(self, config: TrainConfig, tokenizer: Any, corpora: Sequence[tuple[Corpus, float]]):
        self.config, self.tokenizer = config, tokenizer
        self.tasks: dict[str, Callable[[Rng], Task]] = {"facts": fact, "tables": table}
        if config.objectives.get("stories"):
            self.tasks["stories"] = Stories([Path(path) for path in config.stories])
        if config.objectives.get("multihop"):
            self.tasks["multihop"] = Multihop(config.multihop)
        self.shortest = min(config.chunk_lengths) + min(config.local_lengths) + config.answer_length
        self.corpora = [(corpus, weight) for corpus, weight in corpora if _long_enough(corpus, self.shortest).any()]
        if not self.corpora:
            longest = max((int(corpus.lengths.max()) for corpus, _ in corpora), default=0)
            raise DocumentError(
                f"the longest document has {longest} tokens, but a sample takes at least {self.shortest} (the shortest "
                f"chunk, local context and answer); give longer documents, or set smaller lengths."
            )
        self.before, self.after = chat_frame(tokenizer)
        self.ends = _sentence_ends(tokenizer)

    @classmethod
    def or_none(cls, config: TrainConfig, tokenizer: Any, corpora: Sequence[tuple[Corpus, float]]) -> Sampler | None:
        """A sampler, or None if no document is long enough."""
        try:
            return cls(config, tokenizer, corpora)
        except DocumentError:
            return None

    def draw(self, step: int, number: int, split: str = "train") -> Memory:
        """The memory of a number in a step; the same one whenever it is asked for."""
        splits = {"train": 0, "held out": 1}
        rng = np.random.default_rng([self.config.seed, splits[split], step, number])
        weights = np.array([weight for _, weight in self.corpora])
        corpus, _ = self.corpora[int(rng.choice(len(weights), p=weights / weights.sum()))]
        room = np.where(_long_enough(corpus, self.shortest), corpus.lengths, 0)
        document = int(rng.choice(len(room), p=room / room.sum()))
        tokens, answer = corpus.document(document), int(corpus.answers[document])
        origin = f"{corpus.name}, document {document}"
        if answer >= 0:
            return self._answered(rng, tokens, answer, origin)
        return self._text(rng, tokens, origin)

    def _text(self, rng: Rng, tokens: np.ndarray, origin: str) -> Memory:
        config = self.config
        chunk, memory, local = (
            int(rng.choice(x)) for x in (config.chunk_lengths, config.memory_lengths, config.local_lengths)
        )
        length = config.answer_length
        room = len(tokens) - length - min(config.local_lengths)
        chunk = max(c for c in config.chunk_lengths if c <= min(chunk, room))
        rows = max(1, min(memory, room) // chunk)
        local = min(local, len(tokens) - rows * chunk - length)
        names = sorted(config.objectives)
        shares = np.array([config.objectives[name] for name in names])
        chosen = rng.choice(len(names), size=config.samples_per_memory, p=shares / shares.sum())
        asked: list[tuple[str, Task | None]] = []
        inserts: list[list[list[int]]] = []
        inserted = 0
        for name in (names[i] for i in chosen):
            if name in TASK_OBJECTIVES:
                task = self.tasks[name](rng)
                pieces = [self._encode(insert + "\n") for insert in task.inserts]
                size = sum(map(len, pieces))
                if inserted + size <= rows * chunk * 2 // 3:
                    inserts.append(pieces)
                    inserted += size
                    asked.append((name, task))
                    continue
                name = "repetition"
            asked.append((name, None))
        own = rows * chunk - inserted
        start = int(rng.integers(0, len(tokens) - own - local - length + 1))
        text = tokens[start : start + own + local + length * len(asked)].tolist()
        far, behind = self._hide(rng, text[:own], inserts), text[own:]
        samples, continued = [], 0
        for name, found in asked:
            prompt = int(rng.choice(config.prompt_lengths))
            if found is not None:
                samples.append(self._question(rng, found, name, behind[:local], prompt))
            elif name == "repetition":
                size = min(local + length, len(far))
                first = int(rng.integers(0, len(far) - size + 1))
                samples.append(_sample(far[first : first + size], length, prompt, name))
            else:
                first = min(continued * length, max(0, len(behind) - local - length))
                samples.append(_sample(behind[first : first + local + length], length, prompt, name))
                continued += 1
        return Memory(np.array(far).reshape(rows, chunk), samples, origin)

    def _answered(self, rng: Rng, tokens: np.ndarray, answer: int, origin: str) -> Memory:
        """A prompt with its answer: the beginning of the prompt is the memory, the rest is the local context."""
        config = self.config
        chunk, local, prompt = (
            int(rng.choice(x)) for x in (config.chunk_lengths, config.local_lengths, config.prompt_lengths)
        )
        local = max(1, min(local, answer - 1))
        rows = -(-(answer - local) // chunk)
        chunk = (answer - local) // rows  # evenly cut; what is left over goes to the local context
        ids = tokens[: answer + config.answer_length].tolist()
        sample = Sample(ids[rows * chunk :], len(ids) - answer, prompt, "answers")
        return Memory(np.array(ids[: rows * chunk]).reshape(rows, chunk), [sample], origin)

    def _question(self, rng: Rng, task: Task, name: str, text: list[int], prompt: int) -> Sample:
        """Text, then the question, in the chat template or plain; the answer with its end is supervised."""
        if self.before is not None and rng.random() < 0.6:
            before, asked = self._control(self.before), self._encode(f"\n\n{task.question}") + self._control(self.after)
            spoken = f"{task.lead} {task.answer}." if task.lead.endswith("is") and rng.random() < 0.3 else task.answer
            answer = [*self._encode(spoken), self.tokenizer.eos_token_id]
        else:
            lead = task.lead or "Answer:"
            plain = (
                f"\n\n{lead}" if lead not in ("", "Answer:") and rng.random() < 0.4 else f"\n\n{task.question}\n{lead}"
            )
            before, asked = [], self._encode(plain)
            answer = self._encode(f"{'' if lead[-1] in ',(' + chr(39) else ' '}{task.answer}\n")
        if rng.random() < 0.5 or len(asked) > prompt:
            prompt = len(asked)
        room = max(0, len(text) - len(before) - len(asked))
        return Sample([*before, *text[len(text) - room :], *asked, *answer], len(answer), prompt, name)

    def _hide(self, rng: Rng, text: list[int], inserts: list[list[list[int]]]) -> list[int]:
        """Put pieces between sentences of a text; the pieces of one task stay in their order."""
        places: list[tuple[int, int, list[int]]] = []
        for pieces in inserts:
            low, high = 0, len(text)
            if len(pieces) > 1 and rng.random() < 0.5:  # all within a few hundred tokens
                low = int(rng.integers(0, max(1, high - 300)))
                high = min(high, low + 300)
            spots = np.sort(rng.integers(low, high + 1, size=len(pieces)))
            places += [
                (self._next_end(text, int(spot)), len(places) + i, piece)
                for i, (spot, piece) in enumerate(zip(spots, pieces, strict=True))
            ]
        result, position = [], 0
        for at, _, piece in sorted(places, key=lambda place: place[:2]):
            result += text[position:at] + piece
            position = at
        return result + text[position:]

    def _next_end(self, text: list[int], at: int) -> int:
        """The first place from `at` on that is behind a sentence; `at` itself if there is none near."""
        near = np.flatnonzero(self.ends[text[max(0, at - 1) : at + 100]])
        return max(0, at - 1) + int(near[0]) + 1 if len(near) and at else at

    def _encode(self, text: str) -> list[int]:
        return encode_text(self.tokenizer, text).token_ids

    def _control(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)


def _long_enough(corpus: Corpus, shortest: int) -> np.ndarray:
    """[D]: which documents make a sample; of those with an answer, the prompt has to give memory and local context."""
    found: np.ndarray = (corpus.lengths >= shortest) & ((corpus.answers < 0) | (corpus.answers > 1))
    return found


def _sample(tokens: list[int], answers: int, prompt: int, name: str) -> Sample:
    return Sample(tokens, min(answers, len(tokens) - 1), prompt, name)


def _sentence_ends(tokenizer: Any) -> np.ndarray:
    """[V]: which tokens end a sentence or a line."""
    pieces = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return np.array([piece.rstrip(" ").endswith((".", "\n", "!", "?")) for piece in pieces])


def check_positions(config: TrainConfig, max_positions: int) -> None:
    """Check that rows and local contexts stay inside the base model's positions.

    Raises:
        ConfigError: naming the lengths.
    """
    longest = max(config.chunk_lengths) + max(*config.prompt_lengths, 128) + config.answer_length
    if longest > max_positions:
        raise ConfigError(
            f"a row takes up to {longest} positions, but the base model has {max_positions}; use smaller chunk_lengths."
        )
