"""The one thread that has the model: jobs are read a chunk at a time, and decoded together, a token at a time.

    step:  one chunk of one job that reads, if it is reading's turn   ->   one token of every choice that is decoded

So a long text keeps nobody waiting for longer than a chunk, and takes no more than half of the time from those who
decode; jobs join between steps, and one that is cancelled is gone with the step under way. What else needs the model
(`run`) takes turns with jobs that read. It knows prompts and jobs, and nothing of HTTP.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from focusllm.decoding.engine import decode, prefilling, start_request
from focusllm.documents.answer import Citation, Sentence
from focusllm.documents.citing import cite_sentence, cite_sentences
from focusllm.documents.detokenizer import Detokenizer
from focusllm.documents.sentences import sentences_in
from focusllm.errors import ConfigError, FocusError, MemoryLimitError
from focusllm.huggingface.embedded import cache_folder
from focusllm.huggingface.modeling import FocusForCausalLM
from focusllm.memory.chunk_cache import SharedChunks
from focusllm.memory.cost import check_question, check_read, free_memory
from focusllm.method.opened import Start, read_start
from focusllm.serving.job import Choice, Cited, Done, Event, Failed, Finished, Job, Piece
from focusllm.serving.refusals import ClosedError, QueueFullError
from focusllm.serving.sampling import Chosen, Sampler
from focusllm.serving.scheduler import Scheduler
from focusllm.serving.stops import StopStrings

KEPT_SHARE = 0.5
"""Of the memory that is free when the worker begins, so much may hold chunks for later requests."""
log = logging.getLogger(__name__)
Result = TypeVar("Result")


@dataclass
class Totals:
    """What a worker has done since it began."""

    steps: int = 0
    read_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    finished_jobs: int = 0
    cancelled_jobs: int = 0
    failed_jobs: int = 0


class Worker:
    """A model at work for many.

    Args:
        model, tokenizer: as loaded.
        scheduler: whose turn it is.
        most_bytes: of chunks that are kept for later requests; None: half of what is free.
    """

    def __init__(
        self, model: FocusForCausalLM, tokenizer: Any, scheduler: Scheduler | None = None, most_bytes: int | None = None
    ):
        self.model, self.tokenizer, self.scheduler = model, tokenizer, scheduler or Scheduler()
        self.config = model.settings
        heads = model.lookup_heads if self.config.is_opened else None
        if most_bytes is None:
            most_bytes = int(KEPT_SHARE * free_memory(model.device))
        self.chunks = SharedChunks(model.base, self.config, heads, most_bytes)
        self.totals = Totals()
        self._heads, self._ends = heads, _ends(model, tokenizer)
        self._preparing: dict[Job, Iterator[None]] = {}
        self._starts: dict[tuple[int, ...], Start | None] = {}
        self._changed = threading.Condition()
        self._is_closing = False
        self._ended: ClosedError | None = None  # what jobs are told that are not finished any more
        self._thread: threading.Thread | None = None

    # For any thread

    def start(self) -> None:
        """Begin to work, in a thread of its own."""
        self._thread = threading.Thread(target=self._run, name="focusllm-worker", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether jobs are worked on."""
        return self._thread is not None and self._thread.is_alive()

    def submit(self, job: Job) -> None:
        """Take a job; what becomes of it is told by `job.emit`.

        Raises:
            QueueFullError: too many wait already. ClosedError: the worker ends.
        """
        with self._changed:
            if self._is_closing:
                raise ClosedError("the server is shutting down; ask another one, or later.")
            try:
                self.scheduler.submit(job)
            except QueueFullError as error:
                raise QueueFullError(str(error), self._seconds_to_wait()) from None
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """End a job within one step."""
        with self._changed:
            job.cancel()
            self._changed.notify()

    def run(self, work: Callable[[], Result]) -> Result:
        """What work gives that needs the model for no longer than a chunk takes; it is done between two steps.

        Raises:
            ClosedError: the worker ends. And what the work raises.
        """
        if self._thread is None or threading.current_thread() is self._thread:
            return work()
        done: Future[Result] = Future()

        def task() -> None:
            try:
                done.set_result(work())
            except BaseException as error:  # raised where it is waited for
                done.set_exception(error)

        with self._changed:
            if self._is_closing:
                raise ClosedError("the server is shutting down; ask another one, or later.")
            self.scheduler.tasks.append(task)
            self._changed.notify()
        return done.result()

    def close(self, seconds: float = 0.0) -> int:
        """Take no more jobs, finish those that there are, and after so many seconds end them; how many that were."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        deadline = time.monotonic() + seconds
        while not self.scheduler.is_idle and self.is_alive and time.monotonic() < deadline:
            time.sleep(0.01)
        with self._changed:
            self._ended = ClosedError("the server was stopped before this was complete; ask again later.")
            left = list({*self.scheduler.waiting, *self.scheduler.running})
            for job in left:
                job.cancel()
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()
        return len(left)

    # For the worker's thread, or a test in its place

    def step(self) -> bool:
        """Read a chunk and decode a token of all that are read; False: there was nothing to do."""
        with self._changed:
            for job in list(self.scheduler.cancelled()):
                self._end(job, Failed(self._ended) if self._ended else Done(job.usage()))
                self.totals.cancelled_jobs += 1
            admitted = self.scheduler.admit()
            turn, decoding = self.scheduler.next_to_read(), list(self.scheduler.decoding)
        for job in admitted:
            self._preparing[job] = self._prepare(job)
        times = [time.perf_counter()]
        if isinstance(turn, Job):
            self._go_on(turn)
        elif turn is not None:
            turn()
        times.append(time.perf_counter())
        if decoding:
            self._decode(decoding)
            times.append(time.perf_counter())
            self.scheduler.spent(times[1] - times[0], times[2] - times[1])
        self.totals.steps += turn is not None or bool(decoding)
        return turn is not None or bool(decoding)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closing or not self.scheduler.is_idle)
                if self._is_closing and self.scheduler.is_idle:
                    return
            self.step()

    def _go_on(self, job: Job) -> None:
        """The next step of a job that reads."""
        try:
            next(self._preparing[job], None)
        except Exception as error:
            self._fail([job], error)

    def _prepare(self, job: Job) -> Iterator[None]:
        """All steps of a job until it can be decoded."""
        prompt, blocks = job.prompt, list(job.prompt.blocks)
        self._check_memory(job)
        job.emit(job.progress())
        start = self._start(prompt.start_ids)
        for number, (piece, step) in enumerate(zip(prompt.pieces, prompt.steps, strict=True)):
            block, is_new = self.chunks.block(piece, start)
            blocks.append(block)
            if not is_new:
                job.num_cached += step
                self.totals.cached_tokens += step
                continue
            job.num_written += step
            self.totals.read_tokens += step
            job.emit(job.progress())
            if number + 1 < len(prompt.pieces):
                yield
        request = start_request(
            *(self.model.base, blocks, prompt.local_ids, self.config),
            *(prompt.prompt_length, self._heads, prompt.word_scores),
        )
        if prompt.pieces:
            yield
        logits = (yield from prefilling(self.model.base, request, self.config))[-1]
        sampling, count = job.sampling, job.sampling.num_choices
        for number in range(count):
            own = request.fork() if number + 1 < count else request
            sampler = Sampler(sampling, self.model.generation_config, number, logits.device)
            told = Detokenizer(self.tokenizer), StopStrings(sampling.stop)
            job.choices.append(Choice(job, number, own, sampler, *told, list(prompt.token_ids)))
        with self._changed:
            self.scheduler.begin_decoding(job)
        del self._preparing[job]
        for choice in list(job.choices):
            self._take(choice, logits)

    def _start(self, token_ids: Sequence[int]) -> Start | None:
        """A shared start; the last ones are kept."""
        key = tuple(token_ids)
        if key not in self._starts:
            if len(self._starts) >= self.scheduler.max_running:
                del self._starts[next(iter(self._starts))]
            self._starts[key] = read_start(self.model.base, key)
        return self._starts[key]

    def _check_memory(self, job: Job) -> None:
        """Refuse what would not fit, if it does not either when nothing is kept for later.

        Raises:
            MemoryLimitError: with what is needed, and what is free.
        """
        prompt, config = job.prompt, self.config
        count = len(prompt.pieces) - self.chunks.count_known(prompt.pieces, prompt.start_ids)
        for most_bytes in (self.chunks.most_bytes, 0):
            self.chunks.make_room(most_bytes)
            try:
                if count:
                    on_device = config.replace(kv_place="device")
                    check_read(self.model.base, on_device, count * config.chunk_length, cache_folder())
                check_question(self.model.base, config, prompt.blocks, job.sampling.max_tokens)
                return
            except MemoryLimitError:
                if most_bytes == 0:
                    raise
                count = len(prompt.pieces)

    def _decode(self, choices: Sequence[Choice]) -> None:
        """One token of each of these choices."""
        try:
            rows = self._logits(choices)
        except Exception as error:
            self._fail(list(dict.fromkeys(choice.job for choice in choices)), error)
            return
        for choice, logits in zip(choices, rows, strict=True):
            if choice not in choice.job.choices:  # another one of its job has just failed
                continue
            try:
                if logits is None:
                    self._finish(choice, choice.detokenizer.finish(), "length")
                else:
                    self._take(choice, logits)
            except Exception as error:
                self._fail([choice.job], error)

    def _logits(self, choices: Sequence[Choice]) -> list[Tensor | None]:
        """Next-token logits [V] of each; None: the base model has no position left for it."""
        requests, newest = [choice.request for choice in choices], [choice.newest for choice in choices]
        try:
            return list(decode(self.model.base, requests, newest, self.config))
        except ConfigError:  # nothing has changed yet, so each can be tried alone
            if len(choices) == 1:
                return [None]
            return [logits for choice in choices for logits in self._logits([choice])]

    def _take(self, choice: Choice, logits: Tensor) -> None:
        """Choose a choice's next token, and hand on what it makes final of the text."""
        sampling = choice.job.sampling
        chosen = choice.sampler.choose(logits, choice.token_ids)
        choice.token_ids.append(chosen.token)
        choice.num_generated += 1
        choice.job.num_generated += 1
        self.totals.generated_tokens += 1
        if chosen.token in self._ends and not sampling.ignore_eos:
            self._finish(choice, choice.detokenizer.finish(), "stop")
            return
        choice.held.append(chosen)
        piece = choice.detokenizer.push(chosen.token)
        if choice.num_generated >= sampling.max_tokens:
            self._finish(choice, piece + choice.detokenizer.finish(), "length")
            return
        text = choice.stops.push(piece)
        if choice.stops.found is not None:
            self._finish(choice, text, "stop")
            return
        if text:
            self._hand_on(choice, text)
        choice.token_ends.append(len(choice.said))

    def _finish(self, choice: Choice, piece: str, reason: str) -> None:
        """A choice is complete with a last piece of text, which may hold a stop string."""
        stops = choice.stops
        text = piece if stops.found is not None else stops.push(piece)
        if stops.found is not None:
            reason = "stop"
        self._hand_on(choice, text + stops.finish(), is_last=True)
        choice.token_ends.append(len(choice.said))
        choice.job.emit(Finished(choice.number, reason, stops.found, *_cited(choice)))
        choice.job.choices.remove(choice)
        with self._changed:
            self.scheduler.drop(choice)
        if not choice.job.choices:
            choice.job.emit(Done(choice.job.usage()))
            self.totals.finished_jobs += 1

    def _hand_on(self, choice: Choice, text: str, is_last: bool = False) -> None:
        tokens: tuple[Chosen, ...] = tuple(choice.held)
        choice.held.clear()
        choice.said += text
        if choice.job.prompt.context is not None:
            self._cite_complete(choice, is_last)
        if text or tokens:
            choice.job.emit(Piece(choice.number, text, tokens))

    def _cite_complete(self, choice: Choice, is_last: bool) -> None:
        """Tell of the sentences that are complete; the last one only if nothing comes behind it."""
        context, before = choice.job.prompt.context, choice.num_cited
        assert context is not None
        found = sentences_in(choice.said[before:])
        for start, end, behind in found if is_last else found[:-1]:
            span = before + start, before + end
            sentence = cite_sentence(context, choice.request.watched, 0, *span, choice.token_ends)
            choice.num_cited = before + behind
            choice.job.emit(Cited(choice.number, sentence, choice.num_cited))

    def _end(self, job: Job, event: Event) -> None:
        with self._changed:
            self.scheduler.remove(job)
        self._preparing.pop(job, None)
        job.choices.clear()
        job.emit(event)

    def _fail(self, jobs: Sequence[Job], error: Exception) -> None:
        if not isinstance(error, FocusError):
            log.error("a step failed", exc_info=error)
        for job in jobs:
            self._end(job, Failed(error))
            self.totals.failed_jobs += 1

    def _seconds_to_wait(self) -> int:
        """A guess at when there is room: not soon where many wait, but within half a minute."""
        return min(max(1, math.ceil(len(self.scheduler.waiting) / self.scheduler.max_running)), 30)


def _cited(choice: Choice) -> tuple[list[Citation] | None, list[Sentence]]:
    """Where a choice looked in documents; nothing of them stands in its local context."""
    context = choice.job.prompt.context
    if context is None:
        return None, []
    return cite_sentences(context, choice.request.watched, 0, choice.said, choice.token_ends)


def _ends(model: FocusForCausalLM, tokenizer: Any) -> frozenset[int]:
    """The tokens that end an answer, by the model's settings, else by its tokenizer."""
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    return frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])
