"""Documents beside a conversation: their chunks, read or not yet, what words find in them, and how they are cited.

    [ start | what is open of documents and of earlier turns ]  [ newest turns ]

All of a document is far context. What the system says stands before the first question, so that chunks are read behind
the same start whatever it says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from focusllm.asking import word_scores
from focusllm.config import FocusConfig
from focusllm.documents.document import Context, Document
from focusllm.documents.sources import Source
from focusllm.documents.text import BETWEEN_DOCUMENTS, encode_chat, encode_text
from focusllm.errors import ConfigError, DocumentError
from focusllm.reading import place_chunks
from focusllm.serving.job import Prompt, cut_pieces


def unread(tokenizer: Any, config: FocusConfig, source: Source) -> Document:
    """A text whose chunks are known and not read yet: it has no blocks.

    Raises:
        DocumentError: it gives no tokens.
    """
    encoded = encode_text(tokenizer, source.text)
    if not encoded.token_ids:
        raise DocumentError(f"{source.name} gives no tokens; give a document with text.")
    chunks, token_ends = place_chunks(encoded, config)
    return Document(
        name=source.name,
        text=source.text,
        token_ids=encoded.token_ids,
        token_ends=token_ends,
        chunks=chunks,
        blocks=[],
        chunk_length=config.chunk_length,
        read_seconds=0.0,
        reader={},
        files=source.files,
        is_far=True,
    )


def about(
    tokenizer: Any,
    config: FocusConfig,
    messages: Sequence[Mapping[str, str]],
    documents: Sequence[Document],
    template_kwargs: Mapping[str, Any],
) -> Prompt:
    """A conversation about documents, of which those without blocks are to be read.

    Raises:
        ConfigError: chunks are condensed here, documents were read behind another start, or what `encode_chat` raises.
    """
    if not config.is_opened:
        raise ConfigError("documents are asked by opened chunks; start the server with --far-context opened.")
    asked = _with_system_inside(messages)
    ids, starts = encode_chat(tokenizer, asked, template_kwargs)
    start, rest = ids[: starts[0]], ids[starts[0] :]
    earlier, local = rest[: -config.local_length], rest[-config.local_length :]
    read = [number for number, document in enumerate(documents) if document.blocks]
    new = [number for number, document in enumerate(documents) if not document.blocks]
    if any(list(documents[number].blocks[0].start_ids) != start for number in read):
        raise ConfigError(
            "the chat template's switches change what stands before documents that were read; leave them out."
        )
    pieces, own = list[list[int]](), list[int]()
    for number in new:
        document = documents[number]
        pieces += [document.token_ids[chunk.first_token : chunk.last_token] for chunk in document.chunks]
        own += document.chunk_steps
    of_turns, steps_of_turns = cut_pieces(earlier, config)
    pieces += of_turns
    own += steps_of_turns
    far = [(number, chunk) for number in (*read, *new) for chunk in range(len(documents[number].chunks))]
    context = Context(documents, [], far, [], [])
    return Prompt(
        local_ids=local,
        start_ids=start,
        pieces=pieces,
        steps=own,
        blocks=[block for number in read for block in documents[number].blocks],
        prompt_length=len(ids) - starts[-1],
        word_scores=word_scores(context, messages[-1]["content"]),
        token_ids=local,
        num_tokens=len(ids) + sum(document.num_tokens for document in documents),
        context=context,
    )


def _with_system_inside(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """The turns of user and model; what the system says stands before what the user first does."""
    told = [message["content"].strip() for message in messages if message["role"] == "system"]
    turns = [dict(message) for message in messages if message["role"] != "system"]
    if not turns or turns[0]["role"] != "user":
        raise ConfigError("a conversation about documents begins with a message of the user; give one.")
    turns[0]["content"] = BETWEEN_DOCUMENTS + BETWEEN_DOCUMENTS.join([*told, turns[0]["content"].strip()])
    return turns
