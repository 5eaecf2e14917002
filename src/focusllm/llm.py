"""The library's front: read documents once, ask them many times.

llm = FocusLLM.from_pretrained()
book = llm.read(Path("book.txt"), progress=True)
answer = llm.ask(book, "Who is Ishmael?", on_text=lambda piece: print(piece, end=""))
print(answer.citations[0].text)

It only hands on: sources become documents in `reading`, questions become answers in `asking`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from focusllm.asking import decoder, frame, going_on
from focusllm.config import FocusConfig, KvDtype, KvPlace
from focusllm.conversation import Conversation
from focusllm.documents.answer import Answer, AnswerStream
from focusllm.documents.document import Document
from focusllm.documents.readers import check_text
from focusllm.documents.sources import Source, names_a_file, of_text, open_source
from focusllm.documents.text import encode_ids, start_tokens, usual_ids
from focusllm.huggingface.embedded import default_model
from focusllm.huggingface.modeling import FocusForCausalLM
from focusllm.huggingface.pretrained import load, save
from focusllm.memory.chunking import split, split_start
from focusllm.memory.chunks import Progress
from focusllm.reading import Reader


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

    def __post_init__(self) -> None:
        self.model.usual_questions = usual_ids(self.tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | None = None,
        *,
        adapter: str | Path | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        config: FocusConfig | None = None,
        weights: str = "auto",
        notify: Callable[[str], None] = lambda _: None,
        **settings: Any,
    ) -> FocusLLM:
        """Load a model with its tokenizer and candidate projections.

        Args:
            model: `qwen2.5-coder-0.5b` or `smollm2-135m` (fetched once), a folder, a hub id; None: the first one, and
                where that cannot be fetched the second.
            adapter: folder or hub id of candidate projections, or `smollm2-135m` for those in this package (with a copy
                of that model in a folder, say); None: those saved with the model, else those in this package for it,
                else untrained ones; "none": untrained ones.
            dtype: a type of torch or its name; `auto`: the checkpoint's own, but float32 on CPUs that have no
                instructions for a 16-bit one.
            device: where to compute; None: a GPU if there is one, else the CPU.
            config: lengths and options; None: those saved with the model, else the defaults.
            weights: on a CPU, a second copy of them to compute with: `int8`, in 8 bits; `packed`, exact, in the layout
                that decoding is fastest with; `plain`: none; `auto`: packed if that takes less than a gibibyte.
            notify: called with a sentence when something takes long (a download), or went otherwise than expected.
            settings: single fields of the config, by name.

        Raises:
            ConfigError, ModelError, AdapterError: with the value, the limit and the remedy.
        """
        model = default_model(notify) if model is None else model
        loaded, tokenizer = load(model, adapter, dtype, device, config, weights, notify, settings)
        return cls(loaded, tokenizer, str(model), notify)

    @property
    def config(self) -> FocusConfig:
        """Lengths and options."""
        return self.model.focus_config

    @property
    def has_trained_candidates(self) -> bool:
        """Whether candidate projections are loaded; without them the far context is opened, not condensed."""
        return self.model.adapter_config is not None

    def read(
        self,
        source: str | Path | Source | Sequence[int],
        *,
        name: str | None = None,
        encoding: str | None = None,
        progress: bool | Progress = False,
        store: str | Path | None = None,
        kv_dtype: KvDtype | None = None,
        kv_place: KvPlace | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> Document:
        """Read a document once, to be asked many times.

        Args:
            source: a file, a folder or a pattern (a `Path`, or a string that names one), a text, token ids, or what
                `open_source` gives. A folder or a pattern is one document of many files (see `read_folder`).
            name: how citations call it; None: the file's name, or "text".
            encoding: of text files; None: found out.
            progress: True for a progress bar, or a function of (tokens done, tokens in all).
            store: a folder that keeps what was read, in files (about 12 KiB a token for the default model in
                bfloat16). The same text is not read again from there, and a read that was broken off goes on. None:
                as `kv_place` says, gone with the document.
            kv_dtype, kv_place: for this document other than in the settings (see `FocusConfig`).
            template_kwargs: switches of the chat template that change what stands before a document, which opened
                chunks are read behind; `ask` takes the same ones.

        Raises:
            DocumentError: a missing file, one that is not text, one without text, or a full disk.
            MemoryLimitError: it would not fit; raised before anything is computed.
        """
        if isinstance(source, Path) or (isinstance(source, str) and names_a_file(source)):
            source = open_source(source, encoding)
        elif isinstance(source, str):
            source = of_text(check_text(source, "the text"))
        return self._reader.read(source, name, progress, store, template_kwargs, kv_dtype=kv_dtype, kv_place=kv_place)

    def read_text(
        self,
        text: str,
        *,
        name: str = "text",
        progress: bool | Progress = False,
        store: str | Path | None = None,
        kv_dtype: KvDtype | None = None,
        kv_place: KvPlace | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> Document:
        """`read` for what is certainly a text, even if it looks like a path."""
        source = of_text(check_text(text, name), name)
        return self._reader.read(source, None, progress, store, template_kwargs, kv_dtype=kv_dtype, kv_place=kv_place)

    def read_folder(
        self,
        folder: str | Path,
        *,
        name: str | None = None,
        encoding: str | None = None,
        progress: bool | Progress = False,
        store: str | Path | None = None,
        kv_dtype: KvDtype | None = None,
        kv_place: KvPlace | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> Document:
        """Read the files of a folder, or those that a pattern such as `src/**/*.py` names, as one document.

        They are read in the order of their names, each headed by a line with its name, relative to the folder, and
        small ones share chunks. Hidden files and what a `.gitignore` leaves out are not read; of files that are not
        text or cannot be read, `notify` is told. A citation names a file and a place in it. The other arguments are
        those of `read`.

        Raises:
            DocumentError: there is nothing in it that can be read. And what `read` raises.
        """
        source = open_source(folder, encoding)
        return self._reader.read(source, name, progress, store, template_kwargs, kv_dtype=kv_dtype, kv_place=kv_place)

    def ask(
        self,
        documents: Document | Sequence[Document],
        question: str,
        *,
        on_text: Callable[[str], None] = lambda _: None,
        template_kwargs: Mapping[str, Any] | None = None,
        **generate: Any,
    ) -> Answer:
        """Ask a question about one or several documents.

        Args:
            documents: in the order in which they should be read; nothing is read again.
            question: put behind them, in the model's chat template.
            on_text: called with pieces of the answer as they become final; joined, they are its text.
            template_kwargs: switches of the chat template, such as `{"enable_thinking": False}`.
            generate: arguments of transformers' `generate()` (max_new_tokens, do_sample, temperature, stop_strings,
                generation_config, ...) for one sequence. By default at most 256 tokens, greedy. `max_length` counts the
                local context as well (`Answer.num_prompt_tokens`).

        Raises:
            DocumentError: an empty question, or one longer than the local context.
            ConfigError: no documents, one that another model or chunk length has read, or arguments that do not fit.
            MemoryLimitError: what a question takes beside so many documents would not fit.
        """
        return self.conversation(documents, template_kwargs=template_kwargs).decoder(question, **generate)(on_text)

    def stream(
        self,
        documents: Document | Sequence[Document],
        question: str,
        *,
        template_kwargs: Mapping[str, Any] | None = None,
        **generate: Any,
    ) -> AnswerStream:
        """`ask` as an iterator over the pieces of the answer.

        It decodes in a thread, which on the CPU is slower than `ask(..., on_text=...)` in one's own: two threads that
        compute share the cores badly even if one is idle.
        """
        return AnswerStream(self.conversation(documents, template_kwargs=template_kwargs).decoder(question, **generate))

    def conversation(
        self,
        documents: Document | Sequence[Document],
        messages: Sequence[Mapping[str, str]] = (),
        *,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> Conversation:
        """Questions of which each sees what was said before: `conversation.ask("And then?")`.

        Args:
            messages: what was said earlier (`load_messages` of a file that `Conversation.save` wrote).

        Raises:
            ConfigError: one that another model or chunk length has read, or messages that are no conversation.
        """
        return Conversation(self._reader, documents, messages, template_kwargs)

    def continue_text(
        self,
        text: str,
        *,
        progress: bool | Progress = False,
        on_text: Callable[[str], None] = lambda _: None,
        **generate: Any,
    ) -> Answer:
        """Go on from a text of any length, without a chat template; arguments are those of `read` and `ask`.

        The text and the answer's, one behind the other, are the whole.

        Raises:
            DocumentError: an empty text. MemoryLimitError: it would not fit.
        """
        ids = [*start_tokens(self.tokenizer), *encode_ids(self.tokenizer, check_text(text, "the text"))]
        far, local = split(ids, self.config)
        start, far = split_start(far, self.model.settings)
        blocks = self._reader.encode(far, progress, self.config, start_ids=start) if far else []
        return decoder(self.model, self.tokenizer, going_on(blocks, local, len(ids)), generate)(on_text)

    def frame(self, question: str, template_kwargs: Mapping[str, Any] | None = None) -> tuple[list[int], list[int]]:
        """The tokens that stand before and after the documents, with the question among the latter.

        Raises:
            DocumentError: an empty question, or one longer than the local context.
            ConfigError: a switch that the chat template does not have.
        """
        return frame(self.tokenizer, self.config, [{"role": "user", "content": question}], template_kwargs)[:2]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write base model, candidate projections, settings and tokenizer into a folder."""
        save(self.model, self.tokenizer, folder)

    @property
    def _reader(self) -> Reader:
        return Reader(self.model, self.tokenizer, self.name, self.notify)
