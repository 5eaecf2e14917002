"""The library's front: documents are put in once, and asked, edited and taken out ever after.

library = Library("library", FocusLLM.from_pretrained("smollm2-135m"))
library.add(Path("book.txt"))
answer = library.ask("book.txt", "Who is Ishmael?")
library.update("book.txt")  # the file was edited: one chunk or two are read

A document is in the catalogue, as a whole, before the first of its chunks is read. Chunks come after and may be gone
again at any time: what is not there is read from the catalogue's text. So a process that dies, or a disk that is full,
leaves no document that answers for another text.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from focusllm.conversation import Conversation
from focusllm.decoding.opened import check_positions
from focusllm.documents.answer import Answer, AnswerStream
from focusllm.documents.document import Chunk, Document
from focusllm.documents.readers import check_text
from focusllm.documents.sources import Source, names_a_file, of_text, open_source
from focusllm.documents.text import encode_ids, encode_text, frame_ids
from focusllm.errors import DocumentError, LibraryError
from focusllm.files import writing_to
from focusllm.huggingface.modeling import FocusForCausalLM
from focusllm.library.catalogue import Catalogue, Content, Entry, KeptChunk, check_folder, is_library
from focusllm.library.chunk_folder import ChunkFolder
from focusllm.library.chunk_store import ChunkStore, is_whole, reader_key
from focusllm.library.cutting import cut
from focusllm.llm import FocusLLM
from focusllm.memory.chunks import ChunkBlock, Notify, Progress
from focusllm.memory.cost import check_read
from focusllm.method.base import layout
from focusllm.method.packed import kept_as
from focusllm.reading import Reader, shown_progress

LONGEST_TOKEN = 5
"""Characters of a token; a text of longer ones is cut into somewhat shorter chunks."""


Result = TypeVar("Result")


class Run(Protocol):
    """Does work, and gives what it gives."""

    def __call__(self, work: Callable[[], Result], /) -> Result:
        """Until it is done."""


@dataclass(frozen=True)
class Change:
    """What adding or updating a document did."""

    entry: Entry
    num_read: int
    """Chunks that were read; the others were there."""


@dataclass(frozen=True)
class Verified:
    """What was found wrong."""

    num_files: int
    damaged_files: list[str]
    """Removed: their chunks are read again when they are needed."""
    damaged_documents: list[str]
    """Their texts are not what was kept; those that could be read anew from their files are not among them."""
    repaired_documents: list[str]


class Library:
    """Documents in a folder, for any number of processes and threads at once.

    Args:
        folder: made when the first document comes. It belongs to one model: its weights, type and settings.
        llm: reads and answers; chunks are opened, whatever its `far_context` is. None: documents can be listed, removed
            and checked only.
        disk_budget: most bytes of chunks; kept for all who use the library from now on. None: as it is set.
        memory_budget: most bytes that documents hold in this process between questions; None: no limit.
        read_only: write nothing; None: if the folder cannot be written to.
        notify: called with a sentence about what is worth knowing.
        run: does work that needs the model, one chunk's reading, where the model is (a server's worker, say). None: one
            thread at a time does it, where it is.

    Raises:
        LibraryError: no library, another model's, one of a newer format, or one that is damaged.
        ConfigError: settings with which chunks cannot be opened.
    """

    def __init__(
        self,
        folder: str | Path,
        llm: FocusLLM | None = None,
        *,
        disk_budget: int | None = None,
        memory_budget: int | None = None,
        read_only: bool | None = None,
        notify: Notify = lambda _: None,
        run: Run | None = None,
    ):
        self.folder, self.memory_budget, self.notify = Path(folder), memory_budget, notify
        self.llm = _opening(llm) if llm is not None else None
        check_folder(self.folder)
        unwritable = is_library(self.folder) and not os.access(self.folder, os.W_OK)
        self.read_only = unwritable if read_only is None else read_only
        self.catalogue = Catalogue(self.folder, self.read_only)
        self.chunks = ChunkFolder(self.folder / "chunks")
        self.run = run or self._one_at_a_time
        self._turn, self._reading = threading.Lock(), threading.Lock()
        self._open: dict[str, tuple[str, Document]] = {}  # by name, with the version; the last asked at the end
        self._store = self._store_of(self.llm) if self.llm is not None else None
        if disk_budget is not None:
            self.catalogue.set_about("disk_budget", disk_budget)
        self.about = self.catalogue.about()
        """What the library was made with."""

    def _store_of(self, llm: FocusLLM) -> ChunkStore:
        base, config, start_ids = llm.model.base, llm.model.settings, frame_ids(llm.tokenizer)[0]
        check_positions(config, layout(base).max_positions, len(start_ids))
        numbers = "int8 weights" if kept_as(base) == "int8" else ""
        reader = reader_key(base, config, start_ids, numbers)
        made = {
            "reader": reader,
            "model": os.path.abspath(llm.name) if os.path.isdir(llm.name) else llm.name,
            "dtype": str(llm.model.dtype).removeprefix("torch."),
            "chunk_length": config.chunk_length,
            "kv_dtype": config.kv_dtype,
        }
        if not is_library(self.folder) and not self.read_only:
            with writing_to(self.folder, "choose another folder"):
                self.folder.mkdir(parents=True, exist_ok=True)
            self.catalogue.create(made)
        about = self.catalogue.about()
        others = [name for name in made if name != "model" and about.get(name) != made[name]]
        if others:
            shown = [name for name in made if name != "reader"]
            was, now = (", ".join(f"{name} {of.get(name)}" for name in shown) for of in (about, made))
            other = " with other weights or another chat template" if others == ["reader"] else ""
            raise LibraryError(
                f"{self.folder} was made with {was}, and this is {now}{other}; load that, or use another folder."
            )
        notify, keeps = self.notify, not self.read_only
        return ChunkStore(self.chunks, base, config, reader, start_ids, llm.model.lookup_heads, notify, keeps)

    # What there is

    def entries(self) -> list[Entry]:
        """All documents, by name."""
        return self.catalogue.entries()

    def entry(self, name: str) -> Entry:
        """What is known of a document.

        Raises:
            LibraryError: there is none of that name.
        """
        return self.catalogue.entry(name)

    def content(self, name: str) -> Content:
        """A document's text, and its chunks' places in it.

        Raises:
            LibraryError: there is none of that name, or it is damaged.
        """
        return self.catalogue.content(name)[1]

    def sets(self) -> dict[str, list[str]]:
        """All sets of documents."""
        return self.catalogue.sets()

    def nbytes(self) -> int:
        """Bytes of chunks on disk."""
        return self.chunks.nbytes()

    def names(self, given: str | Sequence[str] | None = None) -> list[str]:
        """The documents that are meant by names of documents and sets; None: all.

        Raises:
            LibraryError: there is nothing of such a name, or nothing at all.
        """
        return self.catalogue.names(given)

    # Putting in and taking out

    def add(
        self,
        source: str | Path | Source,
        *,
        name: str | None = None,
        encoding: str | None = None,
        into: str | None = None,
        progress: bool | Progress = False,
    ) -> Change:
        """Put a document in and read what of it was not read yet. One that is there already, just so, stays.

        Args:
            source: as `FocusLLM.read` takes it: a file, a folder, a pattern, a text, or what `open_source` gives.
            name: what it is called from now on; None: the file's name, or "text".
            encoding: of text files; None: found out.
            into: a set that it belongs to.
            progress: True for a progress bar, or a function of (tokens done, tokens in all).

        Raises:
            DocumentError: it cannot be read, or the disk is full; what was read of it stays, and adding it goes on.
            LibraryError: another text has that name, or nothing may be written.
            MemoryLimitError: it would not fit; nothing was changed.
        """
        found = _opened_source(source, encoding).named(name)
        if self.catalogue.has(found.name):
            entry, content = self.catalogue.content(found.name)
            if content.text != found.text:
                raise LibraryError(
                    f"there is a document {found.name} already, with another text; update it, or give this one another "
                    f"name."
                )
            if into is not None:
                self.catalogue.put_into(into, [found.name])
            return Change(entry, self._read(entry, content, progress)[1])
        return self._put(found, into, progress)

    def update(
        self,
        name: str,
        source: str | Path | Source | None = None,
        *,
        encoding: str | None = None,
        progress: bool | Progress = False,
    ) -> Change:
        """Put another text in the place of a document's, and read what changed: where a sentence changed, a chunk or
        two.

        Args:
            source: the new text; None: the file that the document is of, as it is now.

        Raises:
            LibraryError: there is no such document, or it is of no file. And what `add` raises.
        """
        entry = self.entry(name)
        if source is None and entry.source is None:
            raise LibraryError(f"{name} was not read from a file; give the new text or a file.")
        given = Path(entry.source or "") if source is None else source
        return self._put(_opened_source(given, encoding).named(name), None, progress)

    def remove(self, names: str | Sequence[str]) -> list[str]:
        """Take documents out, or all of a set; which. Chunks that no other has are removed by `gc`.

        Raises:
            LibraryError: there is nothing of such a name.
        """
        self._check_writable()
        found = self.names(names)
        self.catalogue.remove(found)
        with self._turn:
            for name in found:
                self._open.pop(name, None)
        return found

    def put_into(self, name: str, documents: str | Sequence[str]) -> None:
        """Put documents into a set, which is there from then on.

        Raises:
            LibraryError: there is no such document, or it is one that has that name.
        """
        self._check_writable()
        self.catalogue.put_into(name, self.names(documents))

    def take_out(self, name: str, documents: str | Sequence[str]) -> None:
        """Take documents out of a set; they stay in the library. A set without documents is none."""
        self._check_writable()
        self.catalogue.take_out(name, self.names(documents))

    # Asking

    def document(self, name: str, progress: bool | Progress = False) -> Document:
        """A document as `FocusLLM.ask` takes it; what is not there of it is read.

        Raises:
            LibraryError: there is none of that name, or it is damaged.
        """
        with self._turn:
            version, document = self._open.get(name, ("", None))
            if document is not None and self.entry(name).version == version:
                self._remember(name, version, document)
                return document
        return self._read(*self.catalogue.content(name), progress)[0]

    def documents(self, names: str | Sequence[str] | None = None, progress: bool | Progress = False) -> list[Document]:
        """Documents and those of sets; None: all."""
        return [self.document(name, progress) for name in self.names(names)]

    def ask(self, names: str | Sequence[str] | None, question: str, **arguments: Any) -> Answer:
        """Ask a question about documents, sets of them, or (None) all; arguments are those of `FocusLLM.ask`."""
        answer = self._reading_llm().ask(self.documents(names), question, **arguments)
        self._make_room()
        return answer

    def stream(self, names: str | Sequence[str] | None, question: str, **arguments: Any) -> AnswerStream:
        """`ask` as an iterator over the pieces of the answer."""
        return self._reading_llm().stream(self.documents(names), question, **arguments)

    def conversation(self, names: str | Sequence[str] | None, *arguments: Any, **named: Any) -> Conversation:
        """Questions that follow one another; arguments are those of `FocusLLM.conversation`. The documents stay as they
        are now for it.
        """
        return self._reading_llm().conversation(self.documents(names), *arguments, **named)

    # Keeping in order

    def verify(self, progress: Callable[[int, int], None] = lambda done, total: None) -> Verified:
        """Check every file and every document, and repair what can be: damaged files of chunks are removed, so that
        they are read again; damaged documents are read anew from their files, if there is a model.

        Args:
            progress: called with (files checked, files in all).

        Raises:
            LibraryError: the catalogue itself is damaged.
        """
        if not self.catalogue.is_sound():
            raise LibraryError(f"the catalogue of {self.folder} is damaged; add its documents to a new folder.")
        files = self.chunks.files()
        damaged = []
        for number, file in enumerate(files, 1):
            if not is_whole(file) and file.path.exists():
                damaged.append(file)
            progress(number, len(files))
        broken, repaired = list[str](), list[str]()
        for entry in self.entries():
            try:
                self.content(entry.name)
            except LibraryError:
                is_repaired = self._is_updated(entry)
                (repaired if is_repaired else broken).append(entry.name)
        for file in damaged if not self.read_only else []:
            self.chunks.remove(file)
        return Verified(len(files), [str(file.path) for file in damaged], broken, repaired)

    def gc(self) -> int:
        """Remove chunks that no document has, and what there is over the budget; how many bytes.

        Raises:
            LibraryError: nothing may be written.
        """
        self._check_writable()
        listed = self.chunks.files()
        return self.chunks.collect(listed, self.catalogue.keys()) + self._make_room()

    def _is_updated(self, entry: Entry) -> bool:
        if self.llm is None or self.read_only or entry.source is None:
            return False
        try:
            self.update(entry.name)
        except (DocumentError, LibraryError) as error:
            self.notify(str(error))
            return False
        return True

    def _put(self, source: Source, into: str | None, progress: bool | Progress) -> Change:
        self._check_writable()
        llm = self._reading_llm()
        for remark in source.remarks:
            self.notify(remark)
        content = self._cut(source)
        config = llm.model.settings.replace(kv_place="disk")
        heads = llm.model.lookup_heads
        check_read(llm.model.base, config, content.num_tokens, self.folder, self.nbytes(), heads=heads)
        entry = self.catalogue.put(source.name, content, source.path, source.digest, into)
        return Change(entry, self._read(entry, content, progress)[1])

    def _cut(self, source: Source) -> Content:
        """A text in chunks, each tokenized on its own, so that no edit elsewhere changes its tokens."""
        llm, text = self._reading_llm(), source.text
        length, tokens = llm.config.chunk_length, self._known_tokens(source.name)
        assert self._store is not None

        def tokens_of(piece: str) -> list[int]:
            if piece not in tokens:
                tokens[piece] = encode_ids(llm.tokenizer, piece)
            return tokens[piece]

        ends = cut(text, lambda piece: len(tokens_of(piece)) <= length, length, LONGEST_TOKEN * length)
        chunks = []
        for start, end in zip([0, *ends], ends, strict=False):
            if ids := tokens_of(text[start:end]):  # some tokenizers make nothing of white space
                chunks.append(KeptChunk(start, end, ids, self._store.key(ids)))
        if not chunks:
            raise DocumentError(f"{source.name} gives no tokens; give a document with text.")
        return Content(text, source.files, chunks)

    def _token_ends(self, content: Content) -> Callable[[int], np.ndarray]:
        """Where in a text a chunk's tokens end, found out when it is asked for."""
        tokenizer = self._reading_llm().tokenizer

        def token_ends(index: int) -> np.ndarray:
            chunk = content.chunks[index]
            spans = encode_text(tokenizer, content.text[chunk.start : chunk.end]).spans
            return np.array([chunk.start + end for _, end in spans], np.int64)

        return token_ends

    def _known_tokens(self, name: str) -> dict[str, list[int]]:
        """The tokens of a document's pieces as they are, if it is there."""
        try:
            _, content = self.catalogue.content(name)
        except LibraryError:
            return {}
        return {content.text[chunk.start : chunk.end]: chunk.token_ids for chunk in content.chunks}

    def _read(self, entry: Entry, content: Content, progress: bool | Progress) -> tuple[Document, int]:
        """Open a document with all its chunks; and how many of them had to be read. Threads take turns by chunks."""
        llm = self._reading_llm()
        assert self._store is not None
        blocks, chunks, ids, num_read = list[ChunkBlock](), list[Chunk](), list[int](), 0
        budget, start = self.catalogue.about().get("disk_budget"), time.perf_counter()
        with shown_progress(progress, content.num_tokens) as report:
            for chunk in content.chunks:
                with self._turn:
                    kept = self._store.kept(chunk.token_ids, chunk.key)
                read = partial(self._store.block, chunk.token_ids, chunk.key)
                block, is_new = (kept, False) if kept is not None else self.run(read)
                blocks.append(block)
                chunks.append(Chunk(chunk.start, chunk.end, len(ids), len(ids) + len(chunk.token_ids)))
                ids += chunk.token_ids
                num_read += is_new
                if is_new and budget is not None:
                    self._make_room()
                if report is not None:
                    report(len(ids), content.num_tokens)
        mark, length = Reader(llm.model, llm.tokenizer, llm.name, llm.notify).mark(), llm.config.chunk_length
        parts = (entry.name, content.text, ids, self._token_ends(content), chunks, blocks, length)
        document = Document(*parts, time.perf_counter() - start, mark, content.files, is_far=True)
        with self._turn:
            if self.catalogue.has(entry.name):  # else it was removed meanwhile
                self._remember(entry.name, entry.version, document)
        return document, num_read

    def _one_at_a_time(self, work: Callable[[], Result]) -> Result:
        with self._reading:
            return work()

    def _make_room(self) -> int:
        """Keep to the budget of the disk."""
        budget = self.catalogue.about().get("disk_budget")
        return self.chunks.make_room(budget) if budget is not None and not self.read_only else 0

    def _remember(self, name: str, version: str, document: Document) -> None:
        """Keep a document for the next question; those that were not asked for longest go where there is a budget."""
        self._open.pop(name, None)
        self._open[name] = version, document
        if self.memory_budget is None:
            return
        held = {one: held_bytes(kept) for one, (_, kept) in self._open.items()}
        for one in [*self._open][:-1]:
            if sum(held.values()) <= self.memory_budget:
                break
            del self._open[one], held[one]

    def _check_writable(self) -> None:
        if self.read_only:
            raise LibraryError(f"{self.folder} may only be read; use it where it can be written to.")

    def _reading_llm(self) -> FocusLLM:
        if self.llm is None:
            raise LibraryError("the library was opened without a model, which reading and asking take; give it one.")
        return self.llm


def _opening(llm: FocusLLM) -> FocusLLM:
    """The same base model, opening chunks."""
    model = FocusForCausalLM(llm.model.base, llm.config.replace(far_context="opened"))
    model.found_heads = llm.model.found_heads
    return replace(llm, model=model)


def held_bytes(document: Document) -> int:
    """About what a document holds in memory."""
    return document.nbytes + len(document.text) + 16 * document.num_tokens


def _opened_source(source: str | Path | Source, encoding: str | None) -> Source:
    if isinstance(source, Source):
        return source
    if isinstance(source, Path) or names_a_file(source):
        return open_source(source, encoding)
    return of_text(check_text(source, "the text"))
