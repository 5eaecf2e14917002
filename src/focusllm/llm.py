"""The library's front: read documents once, ask them many times.

llm = FocusLLM.from_pretrained("smollm2-135m")
book = llm.read(Path("book.txt"), progress=True)
answer = llm.ask(book, "Who is Ishmael?", on_text=lambda piece: print(piece, end=""))
print(answer.citations[0].text)
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, StoppingCriteria, StoppingCriteriaList

from focusllm.config import FocusConfig, KvDtype, KvPlace
from focusllm.documents.answer import Answer, AnswerStream, TimedStreamer
from focusllm.documents.document import Chunk, Document, citations, divide
from focusllm.documents.readers import DOCUMENT_SUFFIXES, check_text, read_text
from focusllm.documents.text import decode_ids, encode_text, frame_question, start_tokens
from focusllm.errors import ConfigError, DocumentError, ModelError, first_line
from focusllm.huggingface.adapter_files import fingerprint
from focusllm.huggingface.embedded import resolve_model
from focusllm.huggingface.loading import UNTRAINED, computing_dtype, find_saved, in_type, on_device, parse_dtype
from focusllm.huggingface.modeling import FocusForCausalLM, FocusState
from focusllm.memory.chunking import cut, num_local_chunks, split
from focusllm.memory.chunks import ChunkBlock, Progress
from focusllm.memory.cost import check_question, peak_memory
from focusllm.method.base import layout
from focusllm.method.packed import is_packed_by_default, pack


@dataclass
class FocusLLM:
    """A model that reads long documents.

    Args:
        model: the model with `generate()`, for use in the ecosystem's own ways.
        tokenizer: its tokenizer.
        notify: called with a sentence about what is worth knowing.
    """

    model: FocusForCausalLM
    tokenizer: Any
    name: str = ""
    notify: Callable[[str], None] = lambda _: None

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = "smollm2-135m",
        *,
        adapter: str | Path | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        config: FocusConfig | None = None,
        packed: bool | None = None,
        notify: Callable[[str], None] = lambda _: None,
        **settings: Any,
    ) -> FocusLLM:
        """Load a model with its tokenizer and candidate projections.

        Args:
            model: `smollm2-135m`, a folder, or a hub id.
            adapter: folder or hub id of candidate projections, or `smollm2-135m` for those in this package (with a copy
                of that model in a folder, say); None: those saved with the model, else those in this package for it,
                else untrained ones; "none": untrained ones.
            dtype: a type of torch or its name; `auto`: the checkpoint's own, but float32 on CPUs that have no
                instructions for a 16-bit one.
            device: where to compute; None: a GPU if there is one, else the CPU.
            config: lengths and options; None: those saved with the model, else the defaults.
            packed: on a CPU, keep a second copy of the weights in the layout that decoding is fastest with; None: if it
                takes less than a gibibyte.
            notify: called with a sentence when something takes long (a download), or went otherwise than expected.
            settings: single fields of the config, by name.

        Raises:
            ConfigError, ModelError, AdapterError: with the value, the limit and the remedy.
        """
        path = resolve_model(model, notify)
        dtype = parse_dtype(dtype)
        found, config = find_saved(model, path, adapter, config)
        config = config.replace(**settings)
        loaded = FocusForCausalLM.from_pretrained(path, focus_config=config, adapter=found or UNTRAINED, dtype=dtype)
        loaded.focus_config.check_positions(layout(loaded.base).max_positions)
        try:
            tokenizer = AutoTokenizer.from_pretrained(path)
        except Exception as error:  # a damaged or newer tokenizer.json raises a bare one
            raise ModelError(f"the tokenizer of {model} cannot be loaded: {first_line(error)}") from error
        loaded = on_device(loaded, device)
        if dtype == "auto" and not getattr(loaded.base, "is_quantized", False):
            loaded = in_type(loaded, computing_dtype(loaded.dtype, loaded.device))
        if is_packed_by_default(loaded) if packed is None else packed:
            pack(loaded)
        return cls(loaded, tokenizer, str(model), notify)

    @property
    def config(self) -> FocusConfig:
        """Lengths and options."""
        return self.model.focus_config

    @property
    def has_trained_candidates(self) -> bool:
        """Whether candidate projections are loaded; without them the far context is of little use."""
        return self.model.adapter_config is not None

    def read(
        self,
        source: str | Path | Sequence[int],
        *,
        name: str | None = None,
        encoding: str = "utf-8",
        progress: bool | Progress = False,
        store: str | Path | None = None,
        kv_dtype: KvDtype | None = None,
        kv_place: KvPlace | None = None,
    ) -> Document:
        """Read a document once, to be asked many times.

        Args:
            source: a file (a `Path`, or a string that names one), a text, or token ids.
            name: how citations call it; None: the file's name, or "text".
            encoding: of a text file.
            progress: True for a progress bar, or a function of (tokens done, tokens in all).
            store: a folder that keeps what was read, in files (about 23 KiB a token for the embedded model in
                bfloat16). The same text is not read again from there, and a read that was broken off goes on. None:
                as `kv_place` says, gone with the document.
            kv_dtype, kv_place: for this document other than in the settings (see `FocusConfig`).

        Raises:
            DocumentError: a missing file, one that is not text, one without text, or a full disk.
            MemoryLimitError: it would not fit; raised before anything is computed.
        """
        is_file = self._is_file(source)
        text, ids, spans = self._tokens(source, encoding, is_file)
        if name is None:
            name = Path(source).name if is_file else "text"  # type: ignore[arg-type]
        return self._read(name, text, ids, spans, progress, store, kv_dtype, kv_place)

    def read_text(
        self,
        text: str,
        *,
        name: str = "text",
        progress: bool | Progress = False,
        store: str | Path | None = None,
        kv_dtype: KvDtype | None = None,
        kv_place: KvPlace | None = None,
    ) -> Document:
        """`read` for what is certainly a text, even if it looks like a path."""
        encoded = encode_text(self.tokenizer, check_text(text, name))
        return self._read(name, text, encoded.token_ids, encoded.spans, progress, store, kv_dtype, kv_place)

    def _read(
        self,
        name: str,
        text: str,
        ids: list[int],
        spans: list[tuple[int, int]],
        progress: bool | Progress,
        store: str | Path | None,
        kv_dtype: KvDtype | None,
        kv_place: KvPlace | None,
    ) -> Document:
        if not ids:
            raise DocumentError(f"{name} gives no tokens; give a document with text.")
        own = {"kv_dtype": kv_dtype, "kv_place": kv_place}
        config = self.config.replace(**{name: value for name, value in own.items() if value is not None})
        start = time.perf_counter()
        blocks = self._encode(ids, progress, config, Path(store) if store is not None else None)
        chunks = [Chunk(spans[first][0], spans[stop - 1][1], first, stop) for first, stop in cut(len(ids), self.config)]
        seconds = time.perf_counter() - start
        return Document(name, text, ids, chunks, blocks, self.config.chunk_length, seconds, self._reader())

    def ask(
        self,
        documents: Document | Sequence[Document],
        question: str,
        *,
        on_text: Callable[[str], None] = lambda _: None,
        **generate: Any,
    ) -> Answer:
        """Ask a question about one or several documents.

        Args:
            documents: in the order in which they should be read; nothing is read again.
            question: put behind them, in the model's chat template.
            on_text: called with pieces of the answer as they become final.
            generate: arguments of transformers' `generate()` (max_new_tokens, do_sample, temperature, stop_strings,
                generation_config, ...) for one sequence. By default at most 256 tokens, greedy.

        Raises:
            DocumentError: an empty question, or one longer than the local context.
            ConfigError: no documents, or one that another model or chunk length has read.
            MemoryLimitError: what a question takes beside so many documents would not fit.
        """
        return self._question(documents, question, generate)(on_text)

    def stream(self, documents: Document | Sequence[Document], question: str, **generate: Any) -> AnswerStream:
        """`ask` as an iterator over the pieces of the answer.

        It decodes in a thread, which on the CPU is slower than `ask(..., on_text=...)` in one's own: two threads that
        compute share the cores badly even if one is idle.
        """
        return AnswerStream(self._question(documents, question, generate))

    def continue_text(
        self,
        text: str,
        *,
        progress: bool | Progress = False,
        on_text: Callable[[str], None] = lambda _: None,
        **generate: Any,
    ) -> Answer:
        """Go on from a text of any length, without a chat template; arguments are those of `read` and `ask`.

        Raises:
            DocumentError: an empty text. MemoryLimitError: it would not fit.
        """
        ids = encode_text(self.tokenizer, check_text(text, "the text")).token_ids
        ids = [*start_tokens(self.tokenizer), *ids]
        far, local = split(ids, self.config)
        blocks = self._encode(far, progress, self.config) if far else []
        return self._decoder(local, FocusState(blocks), generate, len(ids))(on_text)

    def _encode(
        self, token_ids: list[int], progress: bool | Progress, config: FocusConfig, store: Path | None = None
    ) -> list[ChunkBlock]:
        with _progress(progress, len(token_ids)) as report:
            return self.model.encode(token_ids, report, store, self.notify, config)

    def frame(self, question: str) -> tuple[list[int], list[int]]:
        """The tokens that stand before and after the documents, with the question among the latter.

        Raises:
            DocumentError: an empty question, or one longer than the local context.
        """
        before, after = frame_question(self.tokenizer, question)
        count = len(before) + len(after)
        if count > self.config.local_length:
            raise DocumentError(
                f"the question takes {count} tokens with the chat template, but the local context holds "
                f"{self.config.local_length}; ask a shorter one, or set local_length to at least {count}."
            )
        return before, after

    def _question(
        self, documents: Document | Sequence[Document], question: str, generate: dict[str, Any]
    ) -> Callable[..., Answer]:
        given = [documents] if isinstance(documents, Document) else list(documents)
        for document in given:
            self._check(document)
        if not given:
            raise ConfigError("there are no documents; read at least one.")
        before, after = self.frame(question)
        num_own = len(before) + len(after)
        chunk_steps = [step for document in given for step in document.chunk_steps]
        num_far = len(chunk_steps) - num_local_chunks(chunk_steps, num_own, self.config)
        blocks, tail, places = divide(given, num_far)
        state = FocusState(blocks, prompt_length=len(after))
        num_tokens = sum(document.num_tokens for document in given)
        check_question(self.model.base, self.config, blocks, generate.get("max_new_tokens") or 256)
        return self._decoder([*before, *tail, *after], state, generate, num_tokens, given, places)

    def _decoder(
        self,
        input_ids: list[int],
        state: FocusState,
        generate: dict[str, Any],
        num_document_tokens: int,
        documents: Sequence[Document] = (),
        places: Sequence[tuple[int, int]] = (),
    ) -> Callable[..., Answer]:
        """A function that decodes from a state, which may hold documents; `places` says what its chunks are."""
        taken = {"streamer", "cache", "past_key_values", "attention_mask", "inputs", "input_ids"} & set(generate)
        if taken:
            raise ConfigError(f"{', '.join(sorted(taken))} is set by ask itself; use model.generate() to choose it.")
        for name in ("num_beams", "num_return_sequences"):
            if generate.get(name, 1) != 1:
                raise ConfigError(
                    f"{name} is {generate[name]}; an answer is one sequence, use model.generate() for more."
                )
        inputs = torch.tensor([input_ids], device=self.model.device)
        defaults = {} if "generation_config" in generate else {"max_new_tokens": 256, "do_sample": False}
        arguments: dict[str, Any] = {**defaults, **generate}
        criteria = StoppingCriteriaList(arguments.pop("stopping_criteria", None) or [])
        if "stop_strings" in arguments:
            arguments["tokenizer"] = self.tokenizer
        if self.model.generation_config.pad_token_id is None:
            arguments.setdefault("pad_token_id", self.tokenizer.eos_token_id)
        start = time.perf_counter()

        def decode(on_text: Callable[[str], None], *more_criteria: StoppingCriteria) -> Answer:
            streamer = TimedStreamer(self.tokenizer, on_text)
            self.model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                cache=state,
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([*criteria, *more_criteria]),
                **arguments,
            )
            times = streamer.token_times
            decoding = times[-1] - times[0]
            return Answer(
                text=streamer.text.strip(),
                citations=citations(documents, places, state.requests[0].paid),
                num_document_tokens=num_document_tokens,
                num_prompt_tokens=len(input_ids),
                num_generated_tokens=len(times),
                time_to_first_token=times[0] - start,
                tokens_per_second=(len(times) - 1) / decoding if decoding else 0.0,
                seconds=time.perf_counter() - start,
                peak_memory=peak_memory(self.model.device),
            )

        return decode

    def save_pretrained(self, folder: str | Path) -> None:
        """Write base model, candidate projections, settings and tokenizer into a folder."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def _tokens(
        self, source: str | Path | Sequence[int], encoding: str, is_file: bool
    ) -> tuple[str, list[int], list[tuple[int, int]]]:
        if isinstance(source, str | Path):
            text = read_text(source, encoding) if is_file else check_text(str(source), "the text")
            encoded = encode_text(self.tokenizer, text)
            return text, encoded.token_ids, encoded.spans
        ids = [int(token) for token in source]
        size: int = self.model.config.vocab_size
        odd = [token for token in ids if not 0 <= token < size]
        if odd:
            raise DocumentError(f"token id {odd[0]} is not in the vocabulary of {size} tokens; use this model's ids.")
        text, spans = decode_ids(self.tokenizer, ids)
        return text, ids, spans

    @staticmethod
    def _is_file(source: str | Path | Sequence[int]) -> bool:
        """A path, a string that names a file, or one that looks as if it should."""
        if isinstance(source, Path):
            return True
        if not isinstance(source, str) or len(source) > 1000 or "\n" in source:
            return False
        return os.path.exists(source) or Path(source).suffix.lower() in DOCUMENT_SUFFIXES

    def _reader(self) -> dict[str, Any]:
        return {**fingerprint(self.model.base), "model": self.name, "dtype": str(self.model.dtype)}

    def _check(self, document: Document) -> None:
        if document.reader != self._reader() or document.chunk_length != self.config.chunk_length:
            raise ConfigError(
                f"{document!r} was read by {document.reader['model']} ({document.reader['dtype']}, chunk_length "
                f"{document.chunk_length}), not by {self.name} ({self.model.dtype}, chunk_length "
                f"{self.config.chunk_length}); read it again."
            )


class _progress:
    """`with _progress(wanted, total) as report`: a tqdm bar, the caller's own function, or nothing."""

    def __init__(self, wanted: bool | Progress, total: int):
        self.wanted, self.total = wanted, total
        self.bar: Any = None

    def __enter__(self) -> Progress | None:
        if callable(self.wanted):
            return self.wanted
        if not self.wanted:
            return None
        from tqdm.auto import tqdm

        self.bar = bar = tqdm(total=self.total, unit="token", unit_scale=True, desc="Reading")

        def report(done: int, total: int) -> None:
            bar.update(done - bar.n)

        return report

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
