"""Words: which texts share rare words with a question (BM25, by bm25s).

Nearly free, and it finds exact strings where look-up heads are not sure; where question and text share no word it finds
nothing. Words are those of bm25s, and single Chinese, Japanese and Korean characters.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

ONE_BY_ONE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
WORDS = rf"(?u)[{ONE_BY_ONE}]|(?:(?![{ONE_BY_ONE}])\w){{2,}}"
"""bm25s's own pattern (two letters or more), but for scripts that put no spaces between words."""


class WordIndex:
    """The words of some texts, counted once (some 3 s for a million tokens) and asked in less than a millisecond."""

    def __init__(self, texts: Sequence[str]):
        words = _words(texts)
        self._num_texts, self._known = len(texts), {word for text in words for word in text}
        if self._known:
            self._index = _bm25s().BM25()
            self._index.index(words, show_progress=False)

    def scores(self, question: str) -> np.ndarray:
        """What the words of a question are worth in every text [len(texts)]; zeros: no text has any of them."""
        asked = [word for word in _words([question])[0] if word in self._known]
        return np.asarray(self._index.get_scores(asked)) if asked else np.zeros(self._num_texts, np.float32)


def _words(texts: Sequence[str]) -> list[list[str]]:
    found: list[list[str]] = _bm25s().tokenize(list(texts), token_pattern=WORDS, return_ids=False, show_progress=False)
    return found


def _bm25s() -> Any:
    # Where JAX is installed, bm25s imports it, and JAX would take three quarters of a GPU's memory for itself.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import bm25s

    return bm25s
