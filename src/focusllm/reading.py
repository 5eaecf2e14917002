"""Sources to documents: a text is tokenized, its chunks are read once, and it is known who has read them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from focusllm.config import FocusConfig
from focusllm.documents.detokenizer import decode_ids
from focusllm.documents.document import Chunk, Document
from focusllm.documents.sources import Source, of_text
from focusllm.documents.text import Encoded, encode_text, frame_ids
from focusllm.errors import ConfigError, DocumentError
from focusllm.huggingface.adapter_files import fingerprint
from focusllm.huggingface.modeling import FocusForCausalLM
from focusllm.memory.chunking import cut
from focusllm.memory.chunks import ChunkBlock, Progress


class Reader:
    """A model as it reads: what it gives belongs to its weights, its type and its lengths.

    Args:
        model, tokenizer: as loaded. name: what it is called when a document is refused.
        notify: called with a sentence about what is worth knowing.
    """

    def __init__(self, model: FocusForCausalLM, tokenizer: Any, name: str, notify: Callable[[str], None]):
        self.model, self.tokenizer, self.name, self.notify = model, tokenizer, name, notify

    def read(
        self,
        source: Source | Sequence[int],
        name: str | None,
        progress: bool | Progress,
        store: str | Path | None,
        template_kwargs: Mapping[str, Any] | None = None,
        **own: Any,
    ) -> Document:
        """Read a document once.

        Args:
            template_kwargs: switches of the chat template, whose head opened chunks are read behind.
            own: settings of this document alone; None: the model's.

        Raises:
            DocumentError, MemoryLimitError, ConfigError: see `FocusLLM.read`.
        """
        if isinstance(source, Source):
            source = source.named(name)
            encoded = encode_text(self.tokenizer, source.text)
        else:
            source, encoded = self._of_ids(source, name or "text")
        if not encoded.token_ids:
            raise DocumentError(f"{source.name} gives no tokens; give a document with text.")
        for remark in source.remarks:
            self.notify(remark)
        config = self.model.focus_config
        changed = config.replace(**{name: value for name, value in own.items() if value is not None})
        start = time.perf_counter()
        start_ids = frame_ids(self.tokenizer, template_kwargs)[0]
        folder = Path(store) if store is not None else None
        blocks = self.encode(encoded.token_ids, progress, changed, folder, start_ids)
        chunks, token_ends = place_chunks(encoded, config)
        seconds = time.perf_counter() - start
        return Document(
            *(source.name, source.text, encoded.token_ids, token_ends, chunks, blocks, config.chunk_length, seconds),
            self.mark(),
            source.files,
            dict(template_kwargs or {}),
        )

    def encode(
        self,
        token_ids: Sequence[int],
        progress: bool | Progress,
        config: FocusConfig,
        store: Path | None = None,
        start_ids: Sequence[int] = (),
    ) -> list[ChunkBlock]:
        """The chunks of a text, read behind a start if they are to be opened, with a progress bar if one is wanted."""
        with shown_progress(progress, len(token_ids)) as report:
            return self.model.encode(token_ids, report, store, self.notify, config, start_ids)

    def mark(self) -> dict[str, Any]:
        """What tells this reader from others."""
        return {**fingerprint(self.model.base), "model": self.name, "dtype": str(self.model.dtype)}

    def check(self, document: Document) -> None:
        """Refuse a document that another one has read.

        Raises:
            ConfigError: with both.
        """
        length, opens = self.model.focus_config.chunk_length, self.model.settings.is_opened
        if document.reader != self.mark() or document.chunk_length != length:
            raise ConfigError(
                f"{document!r} was read by {document.reader['model']} ({document.reader['dtype']}, chunk_length "
                f"{document.chunk_length}), not by {self.name} ({self.model.dtype}, chunk_length {length}); read it "
                f"again."
            )
        if document.is_to_be_opened != opens:
            how = ("condensed", "opened")
            raise ConfigError(
                f"{document!r} was read to be {how[not opens]}, but far_context is {how[opens]} now; read it again."
            )

    def _of_ids(self, given: Sequence[int], name: str) -> tuple[Source, Encoded]:
        ids, size = [int(token) for token in given], int(self.model.config.vocab_size)
        odd = [token for token in ids if not 0 <= token < size]
        if odd:
            raise DocumentError(f"token id {odd[0]} is not in the vocabulary of {size} tokens; use this model's ids.")
        text, spans = decode_ids(self.tokenizer, ids)
        return of_text(text, name), Encoded(ids, spans)


def place_chunks(encoded: Encoded, config: FocusConfig) -> tuple[list[Chunk], Callable[[int], np.ndarray]]:
    """Where the chunks of a text are, and of a chunk, by its index, where each of its tokens ends (see `Document`)."""
    spans, bounds = encoded.spans, cut(len(encoded.token_ids), config)
    chunks = [Chunk(spans[first][0], spans[stop - 1][1], first, stop) for first, stop in bounds]
    ends = np.array([end for _, end in spans], np.int64)

    def token_ends(index: int) -> np.ndarray:
        return ends[chunks[index].first_token : chunks[index].last_token]

    return chunks, token_ends


@contextmanager
def shown_progress(wanted: bool | Progress, total: int) -> Iterator[Progress | None]:
    """A tqdm bar, the caller's own function, or nothing, as was wanted."""
    if callable(wanted) or not wanted:
        yield wanted or None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, unit="token", unit_scale=True, desc="Reading") as bar:

        def report(done: int, total: int) -> None:
            bar.update(done - bar.n)

        yield report
