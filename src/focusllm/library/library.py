"""The library's front: documents are put in once, and asked, edited and taken out ever after.

library = Library("library", FocusLLM.from_pretrained("smollm2-135m", far_context="opened"))
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from focusllm.decoding.opened import check_positions
from focusllm.documents.answer import Answer, AnswerStream
from focusllm.documents.document import Chunk, Document
from focusllm.documents.readers import check_text
from focusllm.documents.sources import Source, names_a_file, of_text, open_source
from focusllm.documents.text import encode_ids, frame_ids
from focusllm.errors import ConfigError, DocumentError, LibraryError
from focusllm.files import digest_of, writing_to
from focusllm.library.catalogue import Catalogue, Content, Entry, KeptChunk, check_folder, is_library
from focusllm.library.chunk_folder import ChunkFolder
from focusllm.library.chunk_store import ChunkStore, is_whole, reader_key
from focusllm.library.cutting import cut
from focusllm.llm import FocusLLM
from focusllm.memory.chunks import Notify, Progress
from focusllm.memory.cost import check_read
from focusllm.method.base import layout
from focusllm.reading import Reader, shown_progress

LONGEST_TOKEN = 5
"""Characters of a token; a text of longer ones is cut into somewhat shorter chunks."""


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
        llm: opens chunks (`far_context="opened"`); None: documents can be listed, removed and checked only.
        disk_budget: most bytes of chunks; kept for all who use the library from now on. None: as it is set.
        memory_budget: most bytes that documents hold in this process between questions; None: no limit.
        read_only: write nothing; None: if the folder cannot be written to.
        notify: called with a sentence about what is worth knowing.

    Raises:
        LibraryError: no library, another model's, one of a newer format, or one that is damaged.
        ConfigError: the model condenses chunks.
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
    ):
        self.folder, self.llm, self.memory_budget, self.notify = Path(folder), llm, memory_budget, notify
        check_folder(self.folder)
        self.read_only = (
            is_library(self.folder) and not os.access(self.folder, os.W_OK) if read_only is None else read_only
        )
        self.catalogue = Catalogue(self.folder, self.read_only)
        self._chunks = ChunkFolder(self.folder / "chunks")
        self._turn = threading.RLock()  # one thread reads at a time
        self._open: dict[str, tuple[str, Document]] = {}  # by name, with the version; the last asked at the end
        self._store = self._opened(llm) if llm is not None else None
        if disk_budget is not None:
            self.catalogue.set_about("disk_budget", disk_budget)
        self.about = self.catalogue.about()
        """What the library was made with."""

    def _opened(self, llm: FocusLLM) -> ChunkStore:
        base, config, start_ids = llm.model.base, llm.model.settings, frame_ids(llm.tokenizer)[0]
        if not config.is_opened:
            raise ConfigError(
                "a library opens chunks, but this model condenses them; load it with far_context='opened'."
            )
        check_positions(config, layout(base).max_positions, len(start_ids))
        reader = reader_key(base, config, start_ids)
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
            was, now = (
                ", ".join(f"{name} {of.get(name)}" for name in made if name != "reader") for of in (about, made)
            )
            raise LibraryError(
                f"{self.folder} was made with {was}, and this is {now}{' of other weights' * (others == ['reader'])}; "
                f"load that, or use another folder."
            )
        notify, keeps = self.notify, not self.read_only
        return ChunkStore(self._chunks, base, config, reader, start_ids, llm.model.lookup_heads, notify, keeps)

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
        return self._chunks.nbytes()

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
        digest: str | None = None,
        progress: bool | Progress = False,
    ) -> Change:
        """Put a document in and read what of it was not read yet. One that is there already, just so, stays.

        Args:
            source: as `FocusLLM.read` takes it: a file, a folder, a pattern, a text, or what `open_source` gives.
            name: what it is called from now on; None: the file's name, or "text".
            encoding: of text files; None: found out.
            into: a set that it belongs to.
            digest: of its file's bytes, if it is not given as a file; kept with it.
            progress: True for a progress bar, or a function of (tokens done, tokens in all).

        Raises:
            DocumentError: it cannot be read, or the disk is full; what was read of it stays, and adding it goes on.
            LibraryError: another text has that name, or nothing may be written.
            MemoryLimitError: it would not fit; nothing was changed.
        """
        found, digest = _opened_source(source, encoding, digest)
        found = found.named(name)
        if found.name in {entry.name for entry in self.entries()}:
            entry, content = self.catalogue.content(found.name)
            if content.text != found.text:
                raise LibraryError(
                    f"there is a document {found.name} already, with another text; update it, or give this one another "
                    f"name."
                )
            if into is not None:
                self.catalogue.put_into(into, [found.name])
            return Change(entry, self._read(entry, content, progress)[1])
        return self._put(found, digest, into, progress)

    def update(
        self,
        name: str,
        source: str | Path | Source | None = None,
        *,
        encoding: str | None = None,
        digest: str | None = None,
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
        found, digest = _opened_source(given, encoding, digest)
        return self._put(found.named(name), digest, None, progress)

    def remove(self, names: str | Sequence[str]) -> list[str]:
        """Take documents out, or all of a set; which. Chunks that no other has are removed by `gc`.

        Raises:
            LibraryError: there is nothing of such a name.
        """
        self._check_writable()
        found = self.names(names)
        self.catalogue.remove(found)
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
            version, document = self._open.pop(name, ("", None))
            if document is None or self.entry(name).version != version:
                entry, content = self.catalogue.content(name)
                version, document = entry.version, self._read(entry, content, progress)[0]
            self._open[name] = version, document
            self._forget_documents(name)
            return document

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
        files = self._chunks.files()
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
            self._chunks.remove(file)
        return Verified(len(files), [str(file.path) for file in damaged], broken, repaired)

    def gc(self) -> int:
        """Remove chunks that no document has, and what there is over the budget; how many bytes.

        Raises:
            LibraryError: nothing may be written.
        """
        self._check_writable()
        listed = self._chunks.files()
        return self._chunks.collect(listed, self.catalogue.keys()) + self._make_room()

    def _is_updated(self, entry: Entry) -> bool:
        if self.llm is None or self.read_only or entry.source is None:
            return False
        try:
            self.update(entry.name)
        except (DocumentError, LibraryError) as error:
            self.notify(str(error))
            return False
        return True

    def _put(self, source: Source, digest: str | None, into: str | None, progress: bool | Progress) -> Change:
        self._check_writable()
        llm = self._reading_llm()
        for remark in source.remarks:
            self.notify(remark)
        content = self._cut(source)
        config = llm.model.settings.replace(kv_place="disk")
        written = sum(file.nbytes for file in self._chunks.files())
        check_read(llm.model.base, config, content.num_tokens, self.folder, written)
        entry = self.catalogue.put(source.name, content, source.path, digest, into)
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

        ends = cut(text, lambda piece: len(tokens_of(piece)) <= length, 3 * length // 2, LONGEST_TOKEN * length)
        chunks = []
        for start, end in zip([0, *ends], ends, strict=False):
            if ids := tokens_of(text[start:end]):  # some tokenizers make nothing of white space
                chunks.append(KeptChunk(start, end, ids, self._store.key(ids)))
        if not chunks:
            raise DocumentError(f"{source.name} gives no tokens; give a document with text.")
        return Content(text, source.files, chunks)

    def _known_tokens(self, name: str) -> dict[str, list[int]]:
        """The tokens of a document's pieces as they are, if it is there."""
        try:
            _, content = self.catalogue.content(name)
        except LibraryError:
            return {}
        return {content.text[chunk.start : chunk.end]: chunk.token_ids for chunk in content.chunks}

    def _read(self, entry: Entry, content: Content, progress: bool | Progress) -> tuple[Document, int]:
        """A document with all its chunks, and how many of them had to be read."""
        llm = self._reading_llm()
        assert self._store is not None
        blocks, chunks, ids, num_read = [], [], list[int](), 0
        budget = self.catalogue.about().get("disk_budget")
        with self._turn, shown_progress(progress, content.num_tokens) as report:
            for chunk in content.chunks:
                block, is_new = self._store.block(chunk.token_ids, chunk.key)
                blocks.append(block)
                chunks.append(Chunk(chunk.start, chunk.end, len(ids), len(ids) + len(chunk.token_ids)))
                ids += chunk.token_ids
                num_read += is_new
                if is_new and budget is not None:
                    self._make_room()
                if report is not None:
                    report(len(ids), content.num_tokens)
        mark, length = Reader(llm.model, llm.tokenizer, llm.name, llm.notify).mark(), llm.config.chunk_length
        return Document(entry.name, content.text, ids, chunks, blocks, length, 0.0, mark, content.files, True), num_read

    def _make_room(self) -> int:
        """Keep to the budget of the disk."""
        budget = self.catalogue.about().get("disk_budget")
        return self._chunks.make_room(budget) if budget is not None and not self.read_only else 0

    def _forget_documents(self, asked: str) -> None:
        """Keep to the budget of memory: documents that were not asked for longest go, never the one that is."""
        if self.memory_budget is None:
            return
        held = {name: held_bytes(document) for name, (_, document) in self._open.items()}
        for name in list(self._open):
            if sum(held.values()) <= self.memory_budget or name == asked:
                break
            del self._open[name], held[name]

    def _check_writable(self) -> None:
        if self.read_only:
            raise LibraryError(f"{self.folder} may only be read; use it where it can be written to.")

    def _reading_llm(self) -> FocusLLM:
        if self.llm is None:
            raise LibraryError("the library was opened without a model, which reading and asking take; give it one.")
        return self.llm


def held_bytes(document: Document) -> int:
    """About what a document holds in memory."""
    return document.nbytes + len(document.text) + 16 * document.num_tokens


def _opened_source(source: str | Path | Source, encoding: str | None, digest: str | None) -> tuple[Source, str | None]:
    """A source, and the digest of its file's bytes, if it is one file."""
    if isinstance(source, Source):
        return source, digest
    if isinstance(source, Path) or names_a_file(source):
        digest = digest_of(Path(source)) if os.path.isfile(source) else None  # before it is read: it may change
        return open_source(source, encoding), digest
    return of_text(check_text(source, "the text")), None
