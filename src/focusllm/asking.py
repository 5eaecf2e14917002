"""Questions to answers: what a question sees of documents becomes a local context and a state, and is decoded."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from focusllm.config import FocusConfig
from focusllm.decoding.request import Request
from focusllm.documents.answer import Answer, AnswerStreamer, Citation, Sentence
from focusllm.documents.citing import cite_chunks, cite_sentences
from focusllm.documents.document import Context, Document, divide, words_of
from focusllm.documents.text import BETWEEN_DOCUMENTS, encode_ids, frame_conversation, frame_ids
from focusllm.errors import ConfigError, DocumentError
from focusllm.huggingface.modeling import FocusForCausalLM, FocusState
from focusllm.memory.chunks import ChunkBlock
from focusllm.memory.cost import check_question, peak_memory

NEW_TOKENS = 256
"""Most tokens of an answer if nothing is said."""
SET_HERE = {"streamer", "past_key_values", "cache", "attention_mask", "inputs", "input_ids", "tokenizer"}
"""Arguments of `generate()` that are not the caller's."""
ONE_SEQUENCE = ("num_beams", "num_return_sequences")


@dataclass(frozen=True)
class Asked:
    """What decoding begins with, and how many tokens it stands for."""

    input_ids: list[int]
    blocks: list[ChunkBlock]
    prompt_length: int | None
    num_document_tokens: int
    context: Context
    num_behind: int
    """Tokens of the local context behind the documents'."""
    word_scores: torch.Tensor | None = None
    """What the question's words are worth in each chunk [R]."""


def frame(
    tokenizer: Any,
    config: FocusConfig,
    messages: Sequence[Mapping[str, str]],
    template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[list[int], list[int], int]:
    """`frame_conversation`, if its last question fits.

    Raises:
        DocumentError: an empty question, or one longer than the local context has room for.
        ConfigError: a switch that the chat template does not have.
    """
    before, turns, num_last = frame_conversation(tokenizer, messages, template_kwargs)
    count, others = len(before) + num_last, 0 if len(messages) == 1 else turn_length(config)
    if count > config.local_length - others:
        beside = f" beside {others} of what was said before" if others else ""
        raise DocumentError(
            f"the question takes {count} tokens with the chat template, but the local context holds "
            f"{config.local_length}{beside}; ask a shorter one, or set local_length to at least {count + others}."
        )
    return before, turns, num_last


def turn_length(config: FocusConfig) -> int:
    """How many tokens of a conversation become a chunk at once: its chunks are the same in every later question."""
    return min(config.chunk_length, max(1, config.local_length // 2))


ReadTurns = Callable[[list[int], list[int]], list[ChunkBlock]]
"""Reads tokens of a conversation as one chunk, behind a start."""


def about(
    documents: Sequence[Document],
    tokenizer: Any,
    config: FocusConfig,
    messages: Sequence[Mapping[str, str]],
    read_turns: ReadTurns,
    template_kwargs: Mapping[str, Any] | None = None,
) -> Asked:
    """A question about documents, and what was said before it.

        [ documents ............ | earlier turns ]  [ end of the documents | newest turns | question ]
          far context, in chunks                      local context

    The turns that the local context does not hold are chunks behind those of the documents, which are all far then.

    Args:
        messages: of user and assistant in turns; the last one is the question.

    Raises:
        ConfigError: no documents, or some that were read with other switches of the chat template. And what `frame`
            raises.
    """
    if not documents:
        raise ConfigError("there are no documents; read at least one.")
    before, turns, num_last = frame(tokenizer, config, messages, template_kwargs)
    num_tokens = sum(document.num_tokens for document in documents)
    step, num_far = turn_length(config), 0
    over = len(before) + len(turns) - config.local_length
    if over > 0 and not config.is_plain(num_tokens + len(before) + len(turns)):
        num_far = -(-over // step) * step
    local = turns[num_far:]
    num_own = config.local_length if num_far else len(before) + len(local)  # so that no document stands behind turns
    context = divide(documents, num_own, encode_ids(tokenizer, BETWEEN_DOCUMENTS), config)
    start, blocks = before, context.blocks
    if blocks and blocks[0].start is not None:  # it stands before opened chunks
        _check_start(documents, tokenizer, before)
        before = []
    blocks = [*blocks, *chain.from_iterable(read_turns(turns[n : n + step], start) for n in range(0, num_far, step))]
    is_chosen_from = bool(context.blocks) and context.blocks[0].lookup is not None
    asked = " ".join(message["content"] for message in messages[-3:] if message["role"] == "user")
    words = word_scores(context, asked) if is_chosen_from else None
    return Asked([*before, *context.token_ids, *local], blocks, num_last, num_tokens, context, len(local), words)


def _check_start(documents: Sequence[Document], tokenizer: Any, before: list[int]) -> None:
    """Refuse switches of the chat template that would change what the documents were read behind. Templates are asked
    anew for that: some write the date there, which may be another one by now.
    """
    known: list[Mapping[str, Any]] = []
    for document in documents:
        if document.template_kwargs in known:  # the documents of a library all have the same
            continue
        known.append(document.template_kwargs)
        if frame_ids(tokenizer, document.template_kwargs)[0] != before:
            raise ConfigError(
                f"the chat template's switches change what stands before {document.name}; read it with the same "
                f"template_kwargs as it is asked with."
            )


def word_scores(context: Context, question: str) -> torch.Tensor:
    """What a question's words are worth in the chunks of the far context [R]."""
    scores = words_of(context.documents).scores(question)
    first = np.cumsum([0, *(len(document.chunks) for document in context.documents)])
    return torch.tensor([float(scores[first[number] + chunk]) for number, chunk in context.far])


def going_on(blocks: list[ChunkBlock], local_ids: list[int], num_tokens: int) -> Asked:
    """The continuation of a text of `num_tokens` tokens; its far context is not cited."""
    return Asked(local_ids, blocks, None, num_tokens, Context([], [], [], [], []), 0)


def decoder(
    model: FocusForCausalLM, tokenizer: Any, asked: Asked, generate: Mapping[str, Any]
) -> Callable[..., Answer]:
    """A function of (on_text, stopping criteria ...) that decodes an answer; it can be called once.

    Args:
        generate: arguments of transformers' `generate()`.

    Raises:
        ConfigError: arguments that do not fit one sequence, or leave no room for an answer.
        MemoryLimitError: what the question takes beside so many chunks would not fit.
    """
    num_prompt = len(asked.input_ids)
    arguments, num_new = _settled(model, tokenizer, generate, num_prompt)
    check_question(model.base, model.settings, asked.blocks, num_new)
    criteria = StoppingCriteriaList(arguments.pop("stopping_criteria", None) or [])
    inputs = torch.tensor([asked.input_ids], device=model.device)
    state = FocusState(asked.blocks, asked.prompt_length, asked.word_scores)
    start = time.perf_counter()

    def decode(on_text: Callable[[str], None], *more_criteria: StoppingCriteria) -> Answer:
        streamer = AnswerStreamer(tokenizer, on_text)
        model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            cache=state,
            streamer=streamer,
            tokenizer=tokenizer,
            stopping_criteria=StoppingCriteriaList([*criteria, *more_criteria]),
            **arguments,
        )
        request, times = state.requests[0], streamer.token_times
        decoding = times[-1] - times[0]
        cited, sentences = _cited(asked, request, streamer)
        return Answer(
            text=streamer.text,
            citations=cited,
            sentences=sentences,
            num_document_tokens=asked.num_document_tokens,
            num_prompt_tokens=num_prompt,
            num_generated_tokens=len(times),
            time_to_first_token=times[0] - start,
            tokens_per_second=(len(times) - 1) / decoding if decoding else 0.0,
            seconds=time.perf_counter() - start,
            peak_memory=peak_memory(model.device),
        )

    return decode


def _cited(asked: Asked, request: Request, streamer: AnswerStreamer) -> tuple[list[Citation], list[Sentence]]:
    """Where an answer looked; places in the local context are counted from its end, as a token may be put in front."""
    num_own = len(asked.context.token_ids) + asked.num_behind
    if request.watched:
        first = len(request.watched[0].local) - num_own
        return cite_sentences(asked.context, request.watched, first, streamer.text, streamer.token_ends)
    paid = request.paid_local
    near = paid[len(paid) - num_own :][: len(asked.context.token_ids)] if paid is not None else None
    return cite_chunks(asked.context, request.paid, near), []


def _settled(
    model: FocusForCausalLM, tokenizer: Any, generate: Mapping[str, Any], num_prompt: int
) -> tuple[dict[str, Any], int]:
    """Arguments of `generate()`, with ours where the caller says nothing; and most tokens that they let it make."""
    taken = SET_HERE & set(generate)
    if taken:
        raise ConfigError(f"{', '.join(sorted(taken))} is set by ask itself; use model.generate() to choose it.")
    given = generate.get("generation_config")

    def said(name: str) -> Any:
        value = generate.get(name)
        return getattr(given, name, None) if value is None else value

    for name in ONE_SEQUENCE:
        if said(name) not in (None, 1):
            raise ConfigError(f"{name} is {said(name)}; an answer is one sequence, use model.generate() for more.")
    arguments = {name: value for name, value in generate.items() if value is not None}
    if given is None:
        arguments.setdefault("do_sample", False)
    num_new, longest = said("max_new_tokens"), said("max_length")
    if num_new is None and longest is None:
        num_new = arguments["max_new_tokens"] = NEW_TOKENS
    elif num_new is None:
        num_new = longest - num_prompt
        if num_new < 1:
            raise ConfigError(
                f"max_length is {longest}, but the question and the end of the documents take {num_prompt} tokens of "
                f"it; set max_new_tokens instead, or max_length to at least {num_prompt + 1}."
            )
    elif num_new < 1:
        raise ConfigError(f"max_new_tokens is {num_new}; it must be at least 1.")
    if said("pad_token_id") is None and model.generation_config.pad_token_id is None:
        arguments["pad_token_id"] = tokenizer.eos_token_id
    return arguments, num_new
