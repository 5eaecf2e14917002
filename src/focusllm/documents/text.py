"""Text to tokens and back; the only user of the tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from focusllm.documents.readers import check_text
from focusllm.errors import DocumentError

PLAIN: dict[str, Any] = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
PLACE_OF_DOCUMENT = "[[document]]"
TOKENS_OF_A_CHARACTER = 4
"""At most, in UTF-8."""


@dataclass(frozen=True)
class Encoded:
    """Token ids of a text, and where each token lies in it: (first character, behind the last)."""

    token_ids: list[int]
    spans: list[tuple[int, int]]


def encode_text(tokenizer: Any, text: str) -> Encoded:
    """Tokenize a text that may hold anything: strings that look like special tokens stay plain text."""
    if not getattr(tokenizer, "is_fast", False):
        ids = encode_ids(tokenizer, text)
        return Encoded(ids, decode_ids(tokenizer, ids)[1])
    encoding = tokenizer(text, return_offsets_mapping=True, **PLAIN)
    return Encoded(list(encoding.input_ids), [tuple(span) for span in encoding.offset_mapping])


def encode_ids(tokenizer: Any, text: str) -> list[int]:
    """`encode_text` without the places."""
    return list(tokenizer(text, **PLAIN).input_ids)


def decode_ids(tokenizer: Any, token_ids: list[int]) -> tuple[str, list[tuple[int, int]]]:
    """A text from token ids, with the place of each; the tokens of one character all have its place.

    Each is decoded behind the ones before it, for what a token says of spaces depends on where it stands.
    """

    def decoded(start: int, stop: int) -> str:
        text: str = tokenizer.decode(token_ids[start:stop], clean_up_tokenization_spaces=False)
        return text

    pieces: list[str] = []
    spans: list[tuple[int, int]] = []
    position = before = first = 0  # tokens from `first` have no place yet, those from `before` stand in front of them
    for stop in range(1, len(token_ids) + 1):
        piece = decoded(before, stop)[len(decoded(before, first)) :]
        is_part = not piece or piece.endswith("\ufffd")
        if is_part and stop - first < TOKENS_OF_A_CHARACTER and stop < len(token_ids):
            continue
        spans += [(position, position + len(piece))] * (stop - first)
        pieces.append(piece)
        position, before, first = position + len(piece), first, stop
    return "".join(pieces), spans


def start_tokens(tokenizer: Any) -> list[int]:
    """The token that the tokenizer itself puts in front of a text, if it does."""
    ids = list(tokenizer("a").input_ids)
    return ids[:1] if ids[:1] == [tokenizer.bos_token_id] else []


def first_token(tokenizer: Any) -> int | None:
    """The token that a model knows as the beginning of a text, else as its end; None: it has neither."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return None


def frame_question(tokenizer: Any, question: str) -> tuple[list[int], list[int]]:
    """The tokens before and after the document in the model's chat template (or a plain question without one).

    Raises:
        DocumentError: an empty question, or one that is not Unicode text.
    """
    if not question.strip():
        raise DocumentError("the question is empty; ask something.")
    check_text(question, "the question")
    before, after = frame_ids(tokenizer)
    if chat_frame(tokenizer)[0] is None:
        return before, encode_ids(tokenizer, f"\n\nQuestion: {question.strip()}\nAnswer:")
    return before, [*encode_ids(tokenizer, f"\n\n{question.strip()}"), *after]


def frame_ids(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens of the chat template around a user's message; without a template those in front of any text."""
    before, after = chat_frame(tokenizer)
    if before is None:
        return start_tokens(tokenizer), []
    arguments: dict[str, Any] = {"add_special_tokens": False, "verbose": False}
    return list(tokenizer(before, **arguments).input_ids), list(tokenizer(after, **arguments).input_ids)


def chat_frame(tokenizer: Any) -> tuple[str | None, str]:
    """What the chat template writes around a user's message; None if there is no usable template."""
    if not getattr(tokenizer, "chat_template", None):
        return None, ""
    message = [{"role": "user", "content": PLACE_OF_DOCUMENT}]
    rendered: str = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    before, found, after = rendered.partition(PLACE_OF_DOCUMENT)
    return (before, after) if found else (None, "")
