"""Questions one after another about the same documents, each of which sees what was said before; and the file of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from focusllm.asking import about, decoder
from focusllm.documents.answer import Answer
from focusllm.documents.document import Document
from focusllm.errors import ConfigError
from focusllm.files import open_text, whole_file, writing_to
from focusllm.json_text import parse_json
from focusllm.memory.chunks import ChunkBlock
from focusllm.reading import Reader

FORMAT = 1
ROLES = ("user", "assistant")


class Conversation:
    """What was said about documents so far, and how to go on with it.

    The newest turns are in the local context. Older ones become chunks behind those of the documents, each read once.

    Args:
        documents: in the order in which they should be read. None of them is changed, nor read again.
        messages: what was said before, `role` (`user` and `assistant` in turns, an answer last) and `content` each.
        template_kwargs: switches of the chat template, such as `{"enable_thinking": False}`.

    Raises:
        ConfigError: a document that another model or chunk length has read, or messages that are no conversation.
    """

    def __init__(
        self,
        reader: Reader,
        documents: Document | Sequence[Document],
        messages: Sequence[Mapping[str, str]] = (),
        template_kwargs: Mapping[str, Any] | None = None,
    ):
        self.documents = [documents] if isinstance(documents, Document) else list(documents)
        for document in self.documents:
            reader.check(document)
        self.messages = checked(messages)
        """All that was said; answers are added as they are complete."""
        self._reader, self._template_kwargs = reader, template_kwargs
        self._earlier: dict[tuple[int, ...], list[ChunkBlock]] = {}  # chunks of turns, by their tokens

    def decoder(self, question: str, **generate: Any) -> Callable[..., Answer]:
        """A function of (on_text, stopping criteria ...) that decodes the answer; the conversation stays as it is.

        Raises:
            DocumentError, ConfigError, MemoryLimitError: see `FocusLLM.ask`.
        """
        model, tokenizer = self._reader.model, self._reader.tokenizer
        messages = [*self.messages, {"role": "user", "content": question}]
        asked = about(
            *(self.documents, tokenizer, model.focus_config, messages, self._read_turns),
            self._template_kwargs,
        )
        return decoder(model, tokenizer, asked, generate)

    def ask(self, question: str, *, on_text: Callable[[str], None] = lambda _: None, **generate: Any) -> Answer:
        """The next question, which with its answer is part of the conversation from then on.

        Args:
            on_text, generate: as of `FocusLLM.ask`.

        Raises:
            DocumentError, ConfigError, MemoryLimitError: see `FocusLLM.ask`; the conversation is as it was then.
        """
        answer = self.decoder(question, **generate)(on_text)
        said = {"role": "user", "content": question}, {"role": "assistant", "content": answer.text}
        self.messages += said
        return answer

    def save(self, path: str | Path) -> None:
        """Write what was said, and about which documents, into a file (JSON), as a whole.

        Raises:
            FocusError: it cannot be written.
        """
        names = [document.name for document in self.documents]
        content = {"focusllm_conversation": FORMAT, "documents": names, "messages": self.messages}
        with writing_to(Path(path), "choose another file"), whole_file(Path(path)) as part:
            part.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def _read_turns(self, token_ids: list[int], start_ids: list[int]) -> list[ChunkBlock]:
        key = (*start_ids, -1, *token_ids)
        if key not in self._earlier:
            read = partial(self._reader.encode, token_ids, False, self._reader.model.focus_config)
            self._earlier[key] = read(start_ids=start_ids)
        return self._earlier[key]


def load_messages(path: str | Path) -> list[dict[str, str]]:
    """What was said in a conversation that was saved.

    Raises:
        ConfigError: there is no such file, or it is no conversation.
    """
    try:
        with open_text(path) as file:
            content = parse_json(file.read())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not JSON"
        raise ConfigError(f"the conversation {path} cannot be read ({reason}); name another file.") from error
    if not isinstance(content, dict) or content.get("focusllm_conversation") != FORMAT:
        raise ConfigError(f"{path} is no conversation of this version (format {FORMAT}); name another file.")
    return checked(content.get("messages"))


def checked(messages: Any) -> list[dict[str, str]]:
    """Messages that a question can follow.

    Raises:
        ConfigError: what they are not.
    """
    found = list[dict[str, str]]()
    for number, message in enumerate(messages if isinstance(messages, Sequence) else [None]):
        role = ROLES[number % 2]
        said = message.get("content") if isinstance(message, Mapping) and message.get("role") == role else None
        if not isinstance(said, str):
            raise ConfigError(f"message {number + 1} of the conversation is not what the {role} said; remove it.")
        found.append({"role": role, "content": said})
    if len(found) % 2:
        raise ConfigError("the conversation ends with a question; remove it, and ask it again.")
    return found
