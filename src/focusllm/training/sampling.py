"""From text to samples: which memory, which local contexts, which answers.

    memory:  n tokens of a document, with the facts of tasks put in between  -->  its own chunks
             before and behind them chunks of other documents, the distractors  -->  R chunks in all
    samples: continuation   the text behind the document's chunks
             repetition     a passage from inside the memory, once more
             tasks          text behind the document's chunks, then a question about what is hidden in them (or, for
                            some, in that text)

Distractors are few different chunks that come again and again, so that what they hold is read once.

Everything is a function of (settings, seed, step, number in the step): there is no state, so a training that goes on
after a stop sees exactly what it would have seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from focusllm.documents.text import chat_frame, encode_ids, frame_question, start_tokens
from focusllm.errors import ConfigError, DocumentError
from focusllm.training.config import QUESTION_FILES, TASK_OBJECTIVES, TrainConfig
from focusllm.training.corpus import Corpus
from focusllm.training.dense import Sample
from focusllm.training.tasks import Questions, Task, fact, read_multihop, read_questions, read_stories, table

Rng = np.random.Generator
LONGEST_QUESTION = 128
"""Tokens that a question with its chat template may take, as far as positions are checked beforehand."""


@dataclass(frozen=True, eq=False)
class Memory:
    """One memory and the samples that are decoded from it: `chunks` [R, C] token ids."""

    chunks: np.ndarray
    samples: list[Sample]
    origin: str
    """Where it is from, for messages."""
    own: slice
    """Which chunks are its document's; the others are distractors."""
    name: str = ""
    """Its part, step and number in it."""


def load_tasks(config: TrainConfig, part: str) -> dict[str, Callable[[Rng], Task]]:
    """What makes the tasks of each objective; of questions from files, those of a part (`train`, `held out`).

    Raises:
        DocumentError: files that are not what they should be.
    """
    tasks: dict[str, Callable[[Rng], Task]] = {"facts": fact, "tables": table}
    readers = dict(zip(QUESTION_FILES, (read_stories, read_multihop, read_questions), strict=True))
    return tasks | {
        name: Questions(read(getattr(config, name)), part)
        for name, read in readers.items()
        if config.objectives.get(name)
    }


class Sampler:
    """Draws memories with their samples.

    Args:
        corpora: with their weights.
        part: `train` or `held out`: other samples, and other questions from files.

    Raises:
        DocumentError: no document gives a sample.
    """

    def __init__(
        self, config: TrainConfig, tokenizer: Any, corpora: Sequence[tuple[Corpus, float]], part: str = "train"
    ):
        self.config, self.tokenizer, self.part = config, tokenizer, part
        self.tasks = load_tasks(config, part)
        self.shortest = min(config.chunk_lengths) + min(config.local_lengths) + config.answer_length
        self.longest_prompt = max(config.memory_lengths) + max(config.local_lengths)
        self.corpora = [pair for pair in corpora if self._usable(pair[0]).any()]
        if not self.corpora:
            longest = max((int(corpus.lengths.max(initial=0)) for corpus, _ in corpora), default=0)
            raise DocumentError(
                f"the longest document has {longest} tokens, but a sample takes at least {self.shortest} (the shortest "
                f"chunk, local context and answer), and a given prompt at most {self.longest_prompt} (the longest "
                f"memory and local context); give other documents, or set other lengths."
            )
        self.before, self.after = chat_frame(tokenizer)
        self.ends = _sentence_ends(tokenizer)

    @property
    def data(self) -> list[list[Any]]:
        """What there is to draw from: [source, documents, tokens] each."""
        return [[corpus.name, len(corpus), int(corpus.lengths.sum())] for corpus, _ in self.corpora]

    @property
    def content(self) -> str:
        """Changes when what there is to draw from does."""
        return " ".join(corpus.digest for corpus, _ in self.corpora)

    @cached_property
    def questions(self) -> str:
        """Changes when the questions from files do; empty if there are none."""
        found = [task for made in self.tasks.values() if isinstance(made, Questions) for task in made.tasks]
        return hashlib.sha256(repr(found).encode()).hexdigest()[:16] if found else ""

    def draw(self, step: int, number: int) -> Memory:
        """The memory of a number in a step; the same one whenever it is asked for."""
        if self.part == "train" and self.config.kept_memories:  # the same ones again and again
            a_step = self.config.memories_per_step
            step, number = divmod((step * a_step + number) % self.config.kept_memories, a_step)
        rng = np.random.default_rng([self.config.seed, int(self.part != "train"), step, number])
        weights = np.array([weight for _, weight in self.corpora])
        corpus, _ = self.corpora[int(rng.choice(len(weights), p=weights / weights.sum()))]
        document = by_length(rng, corpus, self._usable(corpus))
        tokens, answer = corpus.document(document), int(corpus.answers[document])
        origin = f"{corpus.name}, document {document}"
        memory = self._answered(rng, tokens, answer, origin) if answer >= 0 else self._text(rng, tokens, origin)
        return replace(memory, name=f"{self.part.replace(' ', '-')}-{step:06d}-{number:03d}")

    def _usable(self, corpus: Corpus) -> np.ndarray:
        """[D]: which documents give a sample; of one with an answer, the prompt gives memory and local context."""
        fits = (corpus.answers >= self.shortest - self.config.answer_length) & (corpus.answers <= self.longest_prompt)
        usable: np.ndarray = np.where(corpus.answers < 0, corpus.lengths >= self.shortest, fits)
        return usable

    def _text(self, rng: Rng, tokens: np.ndarray, origin: str) -> Memory:
        config, (of_windows,) = self.config, rng.spawn(1)  # whose draws leave the others as they are
        chunk, memory, local = (
            int(rng.choice(x)) for x in (config.chunk_lengths, config.memory_lengths, config.local_lengths)
        )
        length = config.answer_length
        room = len(tokens) - length - min(config.local_lengths)
        chunk = max(c for c in config.chunk_lengths if c <= min(chunk, room))
        rows = max(1, min(memory, room) // chunk)
        local = min(local, len(tokens) - rows * chunk - length)
        asked = self._asked(rng, rows * chunk * 2 // 3)
        longest = min(max(config.local_lengths), local + length * len(asked), len(tokens) - rows * chunk)
        near = [self._is_local(rng, task, pieces, longest) for _, task, pieces in asked]
        inserts = [pieces for (_, task, pieces), is_local in zip(asked, near, strict=True) if task and not is_local]
        taken = rows * chunk - sum(len(piece) for pieces in inserts for piece in pieces)
        needed = max(local + length, longest if any(near) else 0)
        start = int(rng.integers(0, len(tokens) - taken - needed + 1))
        text = tokens[start : start + taken + local + length * len(asked)].tolist()
        (far, spans), behind = self._hide(rng, text[:taken], inserts), text[taken:]
        before, after = self._distractors(rng, chunk, tokens)
        own = slice(len(before), len(before) + rows)
        chunks = np.concatenate([*before, np.array(far).reshape(rows, chunk), *after])
        order = rng.permutation(len(chunks)).tolist() if config.refresh_rows else []
        samples, continued, hidden = [], 0, iter(spans)
        for (name, task, pieces), is_local in zip(asked, near, strict=True):
            prompt = int(rng.choice(config.prompt_lengths))
            if task is not None and is_local:
                beside = self._beside(rng, behind[:longest], task, pieces)
                sample, sources = self._question(rng, task, name, beside, prompt), []
            elif task is not None:
                sample, sources = self._question(rng, task, name, behind[:local], prompt), next(hidden)
            elif name == "repetition":
                row = int(rng.integers(len(chunks))) if before or after else own.start
                at, passage = (0, far) if own.start <= row < own.stop else (row - own.start, chunks[row].tolist())
                sample, first = self._repetition(rng, passage, local, prompt)
                sources = [(at * chunk + first, at * chunk + first + len(sample.token_ids))]
            else:
                first = min(continued * length, max(0, len(behind) - local - length))
                sample = _sample(behind[first : first + local + length], length, prompt, name)
                sample = replace(sample, window=self._before(text[: taken + first + local]))
                sources = [(rows * chunk - 1, rows * chunk)]
                continued += 1
            if task is not None:
                sample = self._shown(of_windows, sample, task, far, sources)
            sources = [(start + own.start * chunk, stop + own.start * chunk) for start, stop in sources]
            samples.append(replace(sample, refreshed=self._refreshed(order, sources, chunk)))
        return Memory(chunks, samples, origin, own)

    def _before(self, text: list[int]) -> list[int]:
        """What the teacher reads before a text goes on."""
        if self.config.objective == "labels":
            return []
        return [*start_tokens(self.tokenizer), *text[-max(self.config.teacher_lengths) :]]

    def _shown(self, rng: Rng, sample: Sample, task: Task, text: list[int], spans: list[tuple[int, int]]) -> Sample:
        """A task's sample with what the teacher reads: its passages among the text around them, or, if they are there,
        the local context. A task that is longer than the teacher's window stays with its true tokens.
        """
        taken, longest = sum(stop - start for start, stop in spans), max(self.config.teacher_lengths)
        if self.config.objective == "labels" or taken > longest:
            return sample
        if not spans:
            return replace(sample, window=sample.token_ids[: -sample.num_answers], truth=task.answer)
        around = max(0, int(rng.choice(self.config.teacher_lengths)) - taken) // len(spans)
        is_read = np.zeros(len(text), dtype=bool)
        for start, stop in spans:
            size = stop - start + around
            first = max(0, min(start - int(rng.integers(around + 1)), len(text) - size))
            is_read[first : first + size] = True
        before, asked = frame_question(self.tokenizer, task.question)
        return replace(sample, window=[*before, *np.array(text)[is_read].tolist(), *asked], truth=task.answer)

    def _asked(self, rng: Rng, room: int) -> list[tuple[str, Task | None, list[list[int]]]]:
        """What a memory is asked: (objective, its task, what is to be hidden for it, at most `room` tokens in all)."""
        config, asked = self.config, []
        names = sorted(config.objectives)
        shares = np.array([config.objectives[name] for name in names])
        chosen = rng.choice(len(names), size=config.samples_per_memory, p=shares / shares.sum())
        for name in (names[i] for i in chosen):
            task, pieces = self._fitting(rng, name, room) if name in TASK_OBJECTIVES else (None, [])
            if task is None and name in TASK_OBJECTIVES:  # nothing of this kind fits any more
                name = "continuation" if config.objectives.get("continuation") else "repetition"
            room -= sum(map(len, pieces))
            asked.append((name, task, pieces))
        return asked

    def _is_local(self, rng: Rng, task: Task | None, pieces: list[list[int]], room: int) -> bool:
        """Whether a task's facts are to stand in the local context; only if they leave half of the room to text."""
        if task is None or not self.config.local_facts:
            return False
        fits = sum(map(len, pieces)) <= (room - self._most_asked(task)) // 2
        return fits and bool(rng.random() < self.config.local_facts)

    def _beside(self, rng: Rng, text: list[int], task: Task, pieces: list[list[int]]) -> list[int]:
        """A text as long as before with pieces in it, behind what the question will take the place of."""
        asked = self._most_asked(task)
        hidden, _ = self._hide(rng, text[asked : len(text) - sum(map(len, pieces))], [pieces])
        return text[:asked] + hidden

    def _most_asked(self, task: Task) -> int:
        """Tokens that a question takes at most, with its chat template."""
        return len(self._encode(f"{self.before or ''}\n\n{task.question}\n{task.lead}{self.after or ''}"))

    def _repetition(self, rng: Rng, text: list[int], local: int, prompt: int) -> tuple[Sample, int]:
        """A passage of a text once more, and where in the text it begins."""
        size = min(local + self.config.answer_length, len(text))
        first = int(rng.integers(0, len(text) - size + 1))
        sample = _sample(text[first : first + size], self.config.answer_length, prompt, "repetition")
        return self._noisy(rng, sample), first

    def _noisy(self, rng: Rng, sample: Sample) -> Sample:
        """One sample in two has some tokens replaced by others of it, its labels excepted; in training only."""
        if not self.config.noise or self.part != "train" or rng.random() < 0.5:
            return sample
        tokens = np.array(sample.token_ids)
        wrong = rng.random(len(tokens)) < self.config.noise
        tokens[wrong] = rng.choice(tokens, size=int(wrong.sum()))
        return replace(sample, token_ids=tokens.tolist(), labels=sample.answers)

    def _distractors(self, rng: Rng, chunk: int, document: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Chunks [1, C] of other documents than this one, to stand before and behind its own."""
        config = self.config
        if not any(config.distractors):
            return [], []
        count = int(rng.choice(config.distractors))
        numbers = rng.choice(config.distractor_pool, size=count, replace=False)
        before = count if rng.random() < 0.5 else int(rng.integers(count + 1))
        drawn = [self._distractor(chunk, int(number)) for number in numbers]
        first, second = (
            [x for x in part if not np.shares_memory(x, document)] for part in (drawn[:before], drawn[before:])
        )
        return first, second

    def _distractor(self, chunk: int, number: int) -> np.ndarray:
        """[1, C]: the same text for the same number, as a view of its document."""
        rng = np.random.default_rng([self.config.seed, int(self.part != "train"), chunk, number, 0])
        long = [(corpus, weight, (corpus.answers < 0) & (corpus.lengths >= chunk)) for corpus, weight in self.corpora]
        long = [entry for entry in long if entry[2].any()]
        weights = np.array([weight for _, weight, _ in long])
        corpus, _, usable = long[int(rng.choice(len(long), p=weights / weights.sum()))]
        tokens = corpus.document(by_length(rng, corpus, usable))
        start = int(rng.integers(len(tokens) - chunk + 1))
        return tokens[None, start : start + chunk]

    def _refreshed(self, order: Sequence[int], sources: list[tuple[int, int]], chunk: int) -> tuple[int, ...] | None:
        """The rows with what a sample asks for, and others up to `refresh_rows`: the first in an order."""
        if self.config.refresh_rows is None:
            return None
        needed = {row for start, stop in sources for row in range(start // chunk, (stop - 1) // chunk + 1)}
        others = [row for row in order if row not in needed]
        return (*sorted(needed), *others[: max(0, self.config.refresh_rows - len(needed))])

    def _fitting(self, rng: Rng, name: str, room: int) -> tuple[Task | None, list[list[int]]]:
        """A task whose inserts have at most `room` tokens, and they; None if a few draws give none."""
        for _ in range(8):
            task = self.tasks[name](rng)
            pieces = [self._encode(insert + "\n") for insert in task.inserts]
            if sum(map(len, pieces)) <= room:
                return task, pieces
        return None, []

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
        order = rng.permutation(rows).tolist() if config.refresh_rows else []
        sample = Sample(ids[rows * chunk :], len(ids) - answer, prompt, "answers", self._refreshed(order, [], chunk))
        return Memory(np.array(ids[: rows * chunk]).reshape(rows, chunk), [sample], origin, slice(0, rows))

    def _question(self, rng: Rng, task: Task, name: str, text: list[int], prompt: int) -> Sample:
        """Text, then the question, in the chat template or plain; the answer with its end is supervised."""
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        if self.config.objective == "distill":  # asked as it is asked when it is used, answered in a sentence
            before, asked = frame_question(self.tokenizer, task.question)
            spoken = f"{task.lead} {task.answer}." if task.lead.endswith(" is") else task.answer
            answer = [*self._encode(spoken), *end]
        elif self.before is not None and rng.random() < 0.6:
            before, asked = self._control(self.before), self._encode(f"\n\n{task.question}") + self._control(self.after)
            spoken = f"{task.lead} {task.answer}." if task.lead.endswith("is") and rng.random() < 0.3 else task.answer
            answer = [*self._encode(spoken), *end]
        else:
            lead = task.lead or "Answer:"
            plain = f"\n\n{lead}" if lead != "Answer:" and rng.random() < 0.4 else f"\n\n{task.question}\n{lead}"
            before, asked = [], self._encode(plain)
            answer = self._encode(f"{'' if lead[-1] in ',(' + chr(39) else ' '}{task.answer}\n")
        if rng.random() < 0.5 or len(asked) > prompt:
            prompt = len(asked)
        room = max(0, len(text) - len(before) - len(asked))
        return Sample([*before, *text[len(text) - room :], *asked, *answer], len(answer), prompt, name)

    def _hide(
        self, rng: Rng, text: list[int], inserts: list[list[list[int]]]
    ) -> tuple[list[int], list[list[tuple[int, int]]]]:
        """Put pieces between sentences of a text; the pieces of one task stay in their order.

        Returns:
            The text with the pieces, and where each task's are in it: [(first token, the one behind)].
        """
        places: list[tuple[int, int, list[int], int]] = []
        for task, pieces in enumerate(inserts):
            low, high = 0, len(text)
            if len(pieces) > 1 and rng.random() < 0.5:  # all within a few hundred tokens
                low = int(rng.integers(0, max(1, high - 300)))
                high = min(high, low + 300)
            spots = np.sort(rng.integers(low, high + 1, size=len(pieces)))
            places += [
                (self._next_end(text, int(spot)), len(places) + i, piece, task)
                for i, (spot, piece) in enumerate(zip(spots, pieces, strict=True))
            ]
        result: list[int] = []
        spans: list[list[tuple[int, int]]] = [[] for _ in inserts]
        position = 0
        for at, _, piece, task in sorted(places, key=lambda place: place[:2]):
            result += text[position:at] + piece
            position = at
            spans[task].append((len(result) - len(piece), len(result)))
        return result + text[position:], spans

    def _next_end(self, text: list[int], at: int) -> int:
        """The first place from `at` on that is behind a sentence; `at` itself if there is none near."""
        near = np.flatnonzero(self.ends[text[max(0, at - 1) : at + 100]])
        return max(0, at - 1) + int(near[0]) + 1 if len(near) and at else at

    def _encode(self, text: str) -> list[int]:
        return encode_ids(self.tokenizer, text)

    def _control(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)


def by_length(rng: Rng, corpus: Corpus, usable: np.ndarray) -> int:
    """One of the usable documents, the longer the likelier."""
    room = np.where(usable, corpus.lengths, 0)
    return int(rng.choice(len(room), p=room / room.sum()))


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
    behind = max(*config.prompt_lengths, LONGEST_QUESTION) + config.answer_length
    row = max(config.chunk_lengths) + behind
    chunks = -(-max(config.memory_lengths) // min(config.chunk_lengths)) + max(config.distractors)
    local = chunks + max(*config.local_lengths, LONGEST_QUESTION) + config.answer_length
    lengths = [("row", row), ("local context behind its candidates", local)]
    if config.objective == "distill":
        lengths.append(("teacher's window", max(config.teacher_lengths) + LONGEST_QUESTION + config.answer_length))
    for name, length in lengths:
        if length > max_positions:
            raise ConfigError(
                f"a {name} takes up to {length} positions, but the base model has {max_positions}; use smaller "
                f"chunk_lengths, local_lengths, prompt_lengths, teacher_lengths or answer_length, or fewer distractors."
            )
