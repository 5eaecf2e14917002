"""Text to tokens; the only user of the tokenizer, but for the way back (`detokenizer`)."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

from focusllm.documents.detokenizer import decode_ids
from focusllm.documents.readers import check_text
from focusllm.errors import ConfigError, DocumentError, first_line

PLAIN: dict[str, Any] = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
PLACE_OF_DOCUMENT = "[[document]]"
BETWEEN_DOCUMENTS = "\n\n"
"""Stands in the local context where one document ends and the next begins, and before the question."""
TOKENS_OF_A_CHARACTER = 4
"""At most, in UTF-8."""
USUAL_QUESTIONS = (
    "Where does Mr. Alder keep the ring?",
    "Who wrote the letter to the mayor?",
    "What is the name of the ship?",
    "How many people were in the room?",
    "When did the war begin?",
    "Why did she leave the house?",
    "Which city did they visit first?",
    "What does the function return?",
)
"""Of many kinds, about no text in particular: what attention pays to a text when these are asked, it pays anyway."""
SET_BY_US = {"conversation", "messages", "tokenize", "add_generation_prompt", "return_tensors", "return_dict"}
"""Arguments of a chat template that are no switches of its own."""
_turn = threading.RLock()
_plain_twins: WeakKeyDictionary[Any, tuple[int, Any]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Encoded:
    """Token ids of a text, and where each token lies in it: (first character, behind the last)."""

    token_ids: list[int]
    spans: list[tuple[int, int]]


def encode_text(tokenizer: Any, text: str) -> Encoded:
    """Tokenize a text that may hold anything: strings that look like control tokens stay plain text."""
    if not getattr(tokenizer, "is_fast", False):
        ids = encode_ids(tokenizer, text)
        return Encoded(ids, decode_ids(tokenizer, ids)[1])
    encoding = _encoded(_plain_twin(tokenizer), text, return_offsets_mapping=True, **PLAIN)
    return Encoded(list(encoding.input_ids), [tuple(span) for span in encoding.offset_mapping])


def encode_ids(tokenizer: Any, text: str) -> list[int]:
    """`encode_text` without the places."""
    return list(_encoded(_plain_twin(tokenizer), text, **PLAIN).input_ids)


def _encoded(tokenizer: Any, text: str, **how: Any) -> Any:
    """What the tokenizer makes of a text. How is kept in the tokenizer itself while it works, so threads take turns:
    else control tokens of a template could be split as if they were a document's.
    """
    with _turn:
        return tokenizer(text, **how)


def _plain_twin(tokenizer: Any) -> Any:
    """The tokenizer, or a twin of it that finds no control token in a text, be it called a special one or not.

    `split_special_tokens` leaves alone only those that are. In the twin all are. Made once, for it takes a second.
    """
    added: Mapping[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    found = any(not token.special and _is_control(token.content) for token in added.values())
    if not found or not getattr(tokenizer, "is_fast", False):  # others split at none of them
        return tokenizer
    count, twin = _plain_twins.get(tokenizer, (0, None))
    if count != len(added):
        from tokenizers import Tokenizer
        from transformers import PreTrainedTokenizerFast

        content = json.loads(tokenizer.backend_tokenizer.to_str())
        for token in content["added_tokens"]:
            token["special"] = token["special"] or _is_control(token["content"])
        twin = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)))
        _plain_twins[tokenizer] = len(added), twin
    return twin


def _is_control(token: str) -> bool:
    """Whether an added token is one that a text cannot mean, such as `</think>` or `[INST]`.

    Others are how some vocabularies write ordinary text: runs of spaces, words of a language or a trade.
    """
    return re.search(r"[<>\[\]{}|\uff5c]", token) is not None


def start_tokens(tokenizer: Any) -> list[int]:
    """The token that the tokenizer itself puts in front of a text, if it does."""
    ids = list(_encoded(tokenizer, "a").input_ids)
    return ids[:1] if ids[:1] == [tokenizer.bos_token_id] else []


def first_token(tokenizer: Any) -> int | None:
    """The token that a model knows as the beginning of a text, else as its end; None: it has neither."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return None


def frame_question(
    tokenizer: Any, question: str, template_kwargs: Mapping[str, Any] | None = None
) -> tuple[list[int], list[int]]:
    """The tokens before and after the document in the model's chat template (or a plain question without one).

    Args:
        template_kwargs: switches of the chat template, such as `enable_thinking`.

    Raises:
        DocumentError: an empty question, or one that is not Unicode text.
        ConfigError: a switch that the chat template does not have.
    """
    return frame_conversation(tokenizer, [{"role": "user", "content": question}], template_kwargs)[:2]


def frame_conversation(
    tokenizer: Any, messages: Sequence[Mapping[str, str]], template_kwargs: Mapping[str, Any] | None = None
) -> tuple[list[int], list[int], int]:
    """The tokens before documents, those after them, which are the conversation's, and how many of these the last
    question takes with all behind it.

    Args:
        messages: `role` (user and assistant in turns) and `content` each, the last one a question.

    Raises:
        DocumentError: an empty question, or a message that is not Unicode text.
        ConfigError: a switch that the chat template does not have, or a template that takes no such messages.
    """
    question = messages[-1]["content"]
    if not question.strip():
        raise DocumentError("the question is empty; ask something.")
    for message in messages:
        check_text(message["content"], "the question" if message is messages[-1] else "a message")
    if chat_frame(tokenizer, template_kwargs)[0] is None:
        turns = [_plain_turn(message) for message in messages]
        last = encode_ids(tokenizer, f"{turns[-1]}\nAnswer:")
        earlier = [encode_ids(tokenizer, turn) for turn in turns[:-1]]
        return frame_ids(tokenizer, template_kwargs)[0], [*chain.from_iterable(earlier), *last], len(last)
    first, *others = messages
    begun = {**first, "content": f"{BETWEEN_DOCUMENTS}{first['content'].strip()}"}
    ids, starts = encode_chat(tokenizer, [begun, *others], template_kwargs)
    return ids[: starts[0]], ids[starts[0] :], len(ids) - starts[-1]


def _plain_turn(message: Mapping[str, str]) -> str:
    """What stands for a message where there is no chat template."""
    said = message["content"].strip()
    return f"{BETWEEN_DOCUMENTS}Question: {said}" if message["role"] == "user" else f"\nAnswer: {said}"


def usual_ids(tokenizer: Any) -> list[list[int]]:
    """The tokens of the usual questions, as behind a document."""
    return [frame_question(tokenizer, question)[1] for question in USUAL_QUESTIONS]


def frame_ids(tokenizer: Any, template_kwargs: Mapping[str, Any] | None = None) -> tuple[list[int], list[int]]:
    """The tokens of the chat template around a user's message; without a template those in front of any text."""
    before, after = chat_frame(tokenizer, template_kwargs)
    if before is None:
        return start_tokens(tokenizer), []
    arguments: dict[str, Any] = {"add_special_tokens": False, "verbose": False}
    head, tail = (list(_encoded(tokenizer, part, **arguments).input_ids) for part in (before, after))
    return head, tail


def chat_frame(tokenizer: Any, template_kwargs: Mapping[str, Any] | None = None) -> tuple[str | None, str]:
    """What the chat template writes around a user's message; None if there is no usable template.

    Raises:
        ConfigError: a switch that the chat template does not have, or a value that it cannot take.
    """
    rendered = _render(tokenizer, [{"role": "user", "content": PLACE_OF_DOCUMENT}], template_kwargs)
    if rendered is None:
        return None, ""
    before, found, after = rendered.partition(PLACE_OF_DOCUMENT)
    return (before, after) if found else (None, "")


def _render(
    tokenizer: Any, messages: Sequence[Mapping[str, str]], template_kwargs: Mapping[str, Any] | None
) -> str | None:
    """What the chat template makes of messages that are to be answered; None: there is none."""
    switches = dict(template_kwargs or {})
    template = tokenizer.get_chat_template() if getattr(tokenizer, "chat_template", None) else ""
    for name in switches:
        if name in SET_BY_US or not re.search(rf"\b{re.escape(name)}\b", template):
            what = "has no switch" if template else "is missing, so it has no switch"
            raise ConfigError(f"the model's chat template {what} {name}; leave it out.")
    if not template:
        return None
    try:
        rendered: str = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True, **switches
        )
    except Exception as error:  # a template is a program, and may raise anything
        given = f" with {', '.join(f'{name}={value!r}' for name, value in switches.items())}" if switches else ""
        raise ConfigError(f"the model's chat template fails{given}: {first_line(error)}") from error
    return rendered


def encode_chat(
    tokenizer: Any, messages: Sequence[Mapping[str, str]], template_kwargs: Mapping[str, Any] | None = None
) -> tuple[list[int], list[int]]:
    """The token ids of a conversation in the chat template, ready to be answered, and which of them is the first
    of what each message says. What messages say stays text, whatever control tokens it looks like.

    Args:
        messages: `role` and `content` each. template_kwargs: switches of the chat template.

    Raises:
        ConfigError: there is no chat template, or it takes no such messages or switches.
        DocumentError: a message that is not Unicode text.
    """
    places = [{"role": message["role"], "content": f"[[message {n}]]"} for n, message in enumerate(messages)]
    rendered = _render(tokenizer, places, template_kwargs)
    if rendered is None:
        raise ConfigError("the model has no chat template; ask it to go on with a text instead (/v1/completions).")
    parts = re.split(r"\[\[message (\d+)\]\]", rendered)
    lost = set(map(str, range(len(messages)))) - set(parts[1::2])
    if lost:
        role = messages[min(map(int, lost))]["role"]
        raise ConfigError(f"the model's chat template has no place for this message of the role {role}; leave it out.")
    ids, starts = list[int](), [0] * len(messages)
    for n, part in enumerate(parts):
        if n % 2:
            starts[int(part)] = len(ids)
            content = messages[int(part)]["content"]
            ids += encode_ids(tokenizer, check_text(content, "a message") if content.strip() else content)
        else:
            ids += _encoded(tokenizer, part, add_special_tokens=False, verbose=False).input_ids
    return ids, starts
