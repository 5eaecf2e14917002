"""Tokens to text, one after another: what is handed on, joined, is what the tokenizer makes of all of them at once."""

from __future__ import annotations

import re
from typing import Any

BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
"""How vocabularies with byte fallback (SentencePiece's) name a byte of a character that they do not have."""
UNFINISHED = "\ufffd"
"""What decoders put in the place of a part of a character."""


class Detokenizer:
    """Hands text on as soon as no later token can change it.

    What a token says depends on the tokens before it: decoders take a space off the beginning of a text, so a token is
    decoded behind a few of those before it. And on those behind it: a character may take several tokens, and a run of
    byte tokens is text only if the whole run is; both are held back until they are complete.

    Args:
        tokenizer: one of transformers.
        skip_special_tokens: leave control tokens out of the text.
    """

    LONGEST, KEPT = 32, 8
    """Tokens that are decoded at once, and of those that were handed on, how many stay in front of what follows: far
    more than a character takes. So the cost of a token does not grow with the text."""

    def __init__(self, tokenizer: Any, skip_special_tokens: bool = True):
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._window: list[int] = []
        self._done = 0  # characters of the window's text that were handed on

    def push(self, token: int) -> str:
        """Take the next token: what it makes final, often nothing."""
        if self._skip and not self._decode([token], True) and self._decode([token]):
            return ""  # a control token: the next one does not stand at the beginning of a text
        self._window.append(token)
        if BYTE_TOKEN.fullmatch(self._tokenizer.convert_ids_to_tokens(token) or ""):
            return ""
        text = self._decode(self._window)
        final = len(text) - text.endswith(UNFINISHED)
        piece, self._done = text[self._done : final], max(self._done, final)
        if len(self._window) > self.LONGEST:
            held = len(text) - self._done
            self._window = self._window[-self.KEPT :]
            self._done = len(self._decode(self._window)) - held
        return piece

    def finish(self) -> str:
        """What was held back; no tokens come any more."""
        text = self._decode(self._window) if self._window else ""
        piece, self._done = text[self._done :], len(text)
        return piece

    def _decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
        text: str = self._tokenizer.decode(
            token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text


def token_text(tokenizer: Any, token: int) -> str:
    """What one token says by itself, a control token too."""
    return str(tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))


def decode_ids(tokenizer: Any, token_ids: list[int]) -> tuple[str, list[tuple[int, int]]]:
    """A text from token ids, control tokens included, with the place of each; the tokens of one character all have its
    place.
    """
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=False)
    pieces: list[str] = []
    spans: list[tuple[int, int]] = []
    position = 0
    for number, token in enumerate(token_ids, 1):
        piece = detokenizer.push(token)
        if number == len(token_ids):
            piece += detokenizer.finish()
        if piece or number == len(token_ids):
            spans += [(position, position + len(piece))] * (number - len(spans))
            pieces.append(piece)
            position += len(piece)
    return "".join(pieces), spans
