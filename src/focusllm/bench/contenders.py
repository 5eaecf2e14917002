"""What is compared, each by its own user's way, and the loop of the process that one of them is measured in.

A contender reads a document and a question to the first token, decodes more tokens, then answers a second question on
the same document. Greedy, without an end-of-text token, so that all do the same amount of work. What a contender needs
is imported when it is made: a process holds its own libraries and no others.
"""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

from focusllm.bench.plan import Plan, Spec
from focusllm.errors import FocusError, MemoryLimitError, first_line
from focusllm.machine import peak_resident

QUESTIONS = ("What is this about?", "What comes at the end?")
WARM_UP_TOKENS = 2048
"""Read once before the first turn: libraries set up what they need, memory is far below the measured peak."""


@dataclass(frozen=True)
class Turn:
    """One turn of a contender."""

    prefill_seconds: float
    """From the token ids of document and question to the first token."""
    seconds_per_token: float
    """Mean of the tokens after the first."""
    second_question_seconds: float
    """From another question on the same document to its first token."""
    linear_tokens: int | None
    """Tokens that went through the model's linear layers for the first token; None: not in the model's own type."""
    bytes_per_token: int
    """Weights, keys and values that decoding one token must read."""


class Contender(Protocol):
    """Something that reads documents and answers."""

    def turn(self, document: Sequence[int], new_tokens: int) -> Turn:
        """Measure once, from nothing; what was read is dropped afterwards."""
        ...

    def peak_memory(self) -> int:
        """Most bytes held so far."""
        ...


@dataclass(frozen=True)
class Job:
    """What a process needs to know to make its contender."""

    spec: Spec
    plan: Plan
    threads: int
    frames: Sequence[tuple[list[int], list[int]]]
    """Tokens before and after the document, for each of the questions."""
    document: list[int]
    """What is read in every turn."""


class Focus:
    """FocusLLM, by `read` and `ask`."""

    def __init__(self, job: Job):
        self.llm = _load(job, job.plan.adapter, weights=job.plan.weights, **job.spec.settings)

    def turn(self, document: Sequence[int], new_tokens: int) -> Turn:
        """Read, ask, ask again."""
        from focusllm.bench.measure import bytes_of_weights
        from focusllm.documents.document import divide
        from focusllm.memory.chunks import count_alike
        from focusllm.method.base import layout

        llm, config, base = self.llm, self.llm.model.settings, self.llm.model.base
        read = llm.read(document)
        first = llm.ask(read, QUESTIONS[0], max_new_tokens=new_tokens, min_new_tokens=new_tokens)
        second = llm.ask(read, QUESTIONS[1], max_new_tokens=1)
        before, asked = llm.frame(QUESTIONS[0])
        far = count_alike(divide([read], len(before) + len(asked), [], config).blocks)
        prompt = min(config.most_prompt_tokens, len(asked))
        most = config.refresh_rows if config.decoding == "cached" else None  # of each length; the others are not read
        behind = prompt + new_tokens // 2
        rows = sum(min(count, most or count) * (length + behind) for length, count in far.items())
        if config.is_opened:  # one token, and what is open
            rows, prompt = min(config.budget, sum(length * count for length, count in far.items())), 0
        kv_tokens = rows + first.num_prompt_tokens
        passes = 2 if config.decoding == "exact" and far else 1  # rows, then the local context
        return Turn(
            prefill_seconds=read.read_seconds + first.time_to_first_token,
            seconds_per_token=1 / first.tokens_per_second,
            second_question_seconds=second.time_to_first_token,
            linear_tokens=sum(block.token_ids.numel() for block in read.blocks)
            + far.total() * prompt
            + first.num_prompt_tokens,
            bytes_per_token=passes * bytes_of_weights(base)
            + kv_tokens * layout(base).kv_bytes_per_token * llm.model.dtype.itemsize,
        )

    def peak_memory(self) -> int:
        """Of the device."""
        from focusllm.memory.cost import peak_memory

        return peak_memory(self.llm.model.device)

    def leave_room(self) -> None:
        """Give back what torch keeps of a GPU's memory between turns, which the other contenders would miss."""
        import torch

        if self.llm.model.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


class Full(Focus):
    """Full attention: the same base model by transformers' own `generate()`, its cache kept for the second question.

    Beyond the model's positions it goes on with rotary angles that it was not trained on: the time is right, the text
    is not worth reading.
    """

    def __init__(self, job: Job):
        self.llm = _load(job, "none", weights="plain")  # it would have no use for them
        self.frames = job.frames

    def turn(self, document: Sequence[int], new_tokens: int) -> Turn:
        """Generate, take the cache back to the document, generate."""
        from transformers import DynamicCache

        from focusllm.bench.measure import bytes_of_weights
        from focusllm.method.base import layout

        base: Any = self.llm.model.base
        cache = DynamicCache(config=base.config)
        (before, after), (_, other) = self.frames
        times = self._generate([*before, *document, *after], cache, new_tokens)
        cache.crop(len(before) + len(document) - cache.get_seq_length())  # negative: so many off the end
        again = self._generate([*before, *document, *other], cache, 1)
        num_tokens = len(before) + len(document) + len(after)
        return Turn(
            prefill_seconds=times[0],
            seconds_per_token=(times[-1] - times[0]) / (new_tokens - 1),
            second_question_seconds=again[0],
            linear_tokens=num_tokens,
            bytes_per_token=bytes_of_weights(base)
            + (num_tokens + new_tokens // 2) * layout(base).kv_bytes_per_token * base.dtype.itemsize,
        )

    def _generate(self, token_ids: list[int], cache: Any, new_tokens: int) -> list[float]:
        """Seconds from the start to each token."""
        import torch

        from focusllm.method.base import CACHE_NAME
        from focusllm.method.differentiable import without_cudnn

        model, clock = self.llm.model, _Clock()
        ids = torch.tensor([token_ids], device=model.device)
        start = time.perf_counter()
        with without_cudnn():
            model.base.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                **{CACHE_NAME: cache},
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=self.llm.tokenizer.eos_token_id,
                streamer=clock,
            )
        return [moment - start for moment in clock.times[1:]]


class _Clock:
    """A streamer that keeps the time of each token; the first thing that it is given is the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: object) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class LlamaCpp:
    """llama.cpp through llama-cpp-python: a GGUF file of the model, flash attention, YaRN beyond its positions."""

    def __init__(self, job: Job):
        import llama_cpp

        self.quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self.quiet, None)
        path = str(job.spec.gguf)
        options: dict[str, Any] = {"n_threads": job.threads, "n_threads_batch": job.threads, "verbose": False}
        try:
            own = llama_cpp.Llama(path, n_ctx=512, verbose=False)  # says how many positions it has
        except ValueError as error:
            raise FocusError(f"{path} cannot be loaded ({first_line(error)}).") from error
        kind = own.metadata["general.architecture"]
        numbers = {
            name: int(own.metadata[f"{kind}.{key}"])
            for name, key in {
                "positions": "context_length",
                "layers": "block_count",
                "hidden": "embedding_length",
                "heads": "attention.head_count",
                "kv_heads": "attention.head_count_kv",
            }.items()
        }
        own.close()
        self.room = (
            len(job.document) + max(len(before) + len(after) for before, after in job.frames) + job.plan.new_tokens
        )
        if self.room > numbers["positions"]:
            options |= {
                "rope_scaling_type": llama_cpp.LLAMA_ROPE_SCALING_TYPE_YARN,
                "rope_freq_scale": numbers["positions"] / self.room,
                "yarn_orig_ctx": numbers["positions"],
            }
        self.llm = llama_cpp.Llama(path, n_ctx=self.room, flash_attn=True, **options)
        self.frames = job.frames
        width = numbers["hidden"] // numbers["heads"]
        self.kv_bytes = 2 * numbers["layers"] * numbers["kv_heads"] * width * 2  # its cache is float16
        self.weights = os.path.getsize(path)

    def turn(self, document: Sequence[int], new_tokens: int) -> Turn:
        """Generate twice; the second time it finds that the document is in its cache."""
        (before, after), (_, other) = self.frames
        self.llm.reset()
        times = self._generate([*before, *document, *after], new_tokens)
        again = self._generate([*before, *document, *other], 1)
        num_tokens = len(before) + len(document) + len(after)
        return Turn(
            prefill_seconds=times[0],
            seconds_per_token=(times[-1] - times[0]) / (new_tokens - 1),
            second_question_seconds=again[0],
            linear_tokens=None,  # its products are in types of its own
            bytes_per_token=self.weights + (num_tokens + new_tokens // 2) * self.kv_bytes,
        )

    def peak_memory(self) -> int:
        """Of the process."""
        return peak_resident()

    def leave_room(self) -> None:
        """Nothing is kept."""

    def _generate(self, token_ids: list[int], new_tokens: int) -> list[float]:
        times: list[float] = []
        start = time.perf_counter()
        for _ in self.llm.generate(token_ids, temp=0.0):
            times.append(time.perf_counter() - start)
            if len(times) == new_tokens:
                break
        return times


MAKERS: dict[str, type[Focus] | type[LlamaCpp]] = {"focus": Focus, "full": Full, "llama.cpp": LlamaCpp}


def serve(connection: Connection, job: Job) -> None:
    """The life of a contender's process: be made, warm up, then a turn whenever the parent says True; False: leave.

    Every answer is a pair: ("done", what was measured), or ("refused", the reason in one sentence).
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    os.dup2(2, 1)  # standard output is the parent's result
    try:
        contender = MAKERS[job.spec.kind](job)
        loaded = {"loaded_memory": contender.peak_memory()}
        contender.turn(job.document[:WARM_UP_TOKENS], 2)
        connection.send(("done", loaded))
        while connection.recv():
            turn = contender.turn(job.document, job.plan.new_tokens)
            found = {**asdict(turn), "peak_memory": contender.peak_memory()}
            contender.leave_room()
            connection.send(("done", found))
    except (MemoryError, MemoryLimitError) as error:
        connection.send(("refused", f"not enough memory: {first_line(error)}"))
    except EOFError:  # the parent is gone
        pass
    except Exception as error:  # a library's own reason: the others can still be measured
        connection.send(("refused", first_line(error)))


def _load(job: Job, adapter: str | None, weights: str, **settings: Any) -> Any:
    import torch
    import transformers

    from focusllm.llm import FocusLLM

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(job.threads)
    plan = job.plan
    return FocusLLM.from_pretrained(
        plan.model, adapter=adapter, dtype=plan.dtype, device=plan.device, weights=weights, **settings
    )
