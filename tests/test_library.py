"""A library: documents read once, by chunks that their own text cuts; edited, shared, forgotten and read again."""

from __future__ import annotations

import os
import random
import re
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from conftest import SMALL, build, byte_tokenizer
from focusllm import (
    ConfigError,
    DocumentError,
    FocusForCausalLM,
    FocusLLM,
    Library,
    LibraryError,
    MemoryLimitError,
)
from focusllm.documents.document import Document
from focusllm.documents.text import encode_ids, frame_ids
from focusllm.library import chunk_store
from focusllm.library.catalogue import CATALOGUE_NAME
from focusllm.library.cutting import cut
from focusllm.method.kv import KV
from focusllm.method.opened import read_behind

CONFIG = SMALL.replace(chunk_length=192, local_length=96, far_context="opened")
NAMES = ("Ahab", "Bildad", "Daggoo", "Elijah", "Fedallah", "Ishmael", "Peleg", "Pip", "Queequeg", "Starbuck", "Stubb")
VERBS = ("sought", "saw", "feared", "forgot", "hailed", "followed", "painted", "named", "lost", "carried")
THINGS = (
    "a whale",
    "the coffin",
    "a doubloon",
    "the harpoon",
    "an island",
    "the oil",
    "a ship",
    "the sea",
    "a compass",
)


def book(seed: int = 0, paragraphs: int = 40) -> str:
    """Paragraphs of a few sentences."""
    draw = random.Random(seed)

    def sentence() -> str:
        return f"{draw.choice(NAMES)} {draw.choice(VERBS)} {draw.choice(THINGS)} on day {draw.randint(1, 999)}. "

    return "\n\n".join("".join(sentence() for _ in range(draw.randint(1, 4))) for _ in range(paragraphs))


BOOK = book()


def tiny(**changes: object) -> FocusLLM:
    model = FocusForCausalLM(build(max_position_embeddings=512), CONFIG.replace(**changes))
    return FocusLLM(model, byte_tokenizer(), "tiny")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Passes as small as these are slower on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def llm() -> FocusLLM:
    return tiny()


@pytest.fixture
def library(tmp_path: Path, llm: FocusLLM) -> Library:
    return Library(tmp_path / "library", llm)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many chunks every pass over chunks reads, one entry a pass."""
    passes: list[int] = []

    def counted(model: object, start_ids: object, chunk_ids: torch.Tensor) -> KV:
        passes.append(len(chunk_ids))
        return read_behind(model, start_ids, chunk_ids)

    monkeypatch.setattr(chunk_store, "read_behind", counted)
    monkeypatch.setattr("focusllm.memory.chunks.read_behind", counted)
    return passes


def same_numbers(a: Document, b: Document, llm: FocusLLM) -> bool:
    """Whether two documents are the same to the last bit: tokens, keys, values, look-up keys, places."""
    if a.token_ids != b.token_ids or a.chunks != b.chunks or a.text != b.text:
        return False
    for x, y in zip(a.blocks, b.blocks, strict=True):
        rows = [block.rows(llm.model.base, 0, 1) for block in (x, y)]
        pairs = [*zip(rows[0].keys, rows[1].keys, strict=True), *zip(rows[0].values, rows[1].values, strict=True)]
        pairs += [(x.lookup.packed, y.lookup.packed), (x.lookup.scales, y.lookup.scales)]
        if not all(torch.equal(*pair) for pair in pairs):
            return False
    return True


PLACES = {"start": 0, "first sentence": 1, "middle": len(re.findall(r"\. ", BOOK)) // 2, "end": -1}
NEW = "Nobody had looked for the white door before. "


def edited(kind: str, place: str) -> str:
    ends = [0, *(match.end() for match in re.finditer(r"\. ", BOOK))]
    number = PLACES[place]
    if place == "end" and kind != "insert":
        number = -2
    at, behind = ends[number], ends[number + 1] if number != -1 else len(BOOK)
    return {
        "insert": BOOK[:at] + NEW + BOOK[at:],
        "delete": BOOK[:at] + BOOK[behind:],
        "replace": BOOK[:at] + NEW + BOOK[behind:],
    }[kind]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["insert", "delete", "replace"])
def test_an_edit_reads_a_chunk_or_two_and_answers_as_a_new_read(
    tmp_path: Path, library: Library, llm: FocusLLM, reads: list[int], kind: str, place: str
) -> None:
    library.add(BOOK, name="book")
    assert sum(reads) == library.entry("book").num_chunks > 15
    reads.clear()
    text = edited(kind, place)
    change = library.update("book", text)
    assert change.num_read == sum(reads) <= 2
    assert change.num_read or kind == "delete"  # of a sentence that was a chunk of its own nothing is left to read
    fresh = Library(tmp_path / "fresh", llm)
    fresh.add(text, name="book")
    updated, new = library.document("book"), fresh.document("book")
    assert updated.text == text
    assert same_numbers(updated, new, llm)
    answers = [one.ask("book", "Who sought the white door?", max_new_tokens=12) for one in (library, fresh)]
    assert answers[0].text == answers[1].text
    assert answers[0].citations == answers[1].citations


def pieces(text: str, longest: int = 1000) -> list[str]:
    ends = cut(text, lambda piece: len(piece) <= longest, longest // 4, 5 * longest)
    return [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]


ODD = {
    "one word": "x" * 5000,
    "one line": book(1, 100).replace("\n", " "),
    "one line many times": "The same line.\n" * 500,
    "no spaces": "".join(random.Random(0).choices("abcdefghij", k=8000)),
    "Chinese": "".join(random.Random(0).choices("\u6d77\u9cb8\u8239\u9577\u3002", k=6000)),
    "white space": "\n \t" * 2000,
    "short": "A word.",
}


@pytest.mark.parametrize("kind", ODD)
def test_any_text_is_cut(kind: str) -> None:
    found = pieces(ODD[kind])
    assert "".join(found) == ODD[kind]
    assert max(map(len, found)) <= 1000
    assert min(map(len, found)) >= 250 or len(found) == 1
    assert pieces("") == []


def test_cuts_are_at_ends_of_paragraphs_and_stay_there() -> None:
    text, draw, changed = book(3, 600), random.Random(1), list[int]()
    before = pieces(text)
    assert all(piece.endswith("\n\n") for piece in before[:-1])
    ends = [match.end() for match in re.finditer(r"\. ", text)]
    for _ in range(60):
        number = draw.randrange(len(ends) - 1)
        at, behind = ends[number], ends[number + 1]
        edited = draw.choice((text[:at] + NEW + text[at:], text[:at] + text[behind:], text[:at] + NEW + text[behind:]))
        changed.append(len(set(pieces(edited)) - set(before)))
    assert len(before) > 50
    assert max(changed) <= 3
    assert sum(changed) <= 1.3 * len(changed)
    assert len(set(pieces(NEW + text)) - set(before)) <= 2
    assert len(set(pieces(text + text)) - set(before)) <= 3  # where both meet


def test_chunks_are_the_text_read_behind_the_start(library: Library, llm: FocusLLM) -> None:
    library.add(BOOK, name="book")
    document = library.document("book")
    start_ids = frame_ids(llm.tokenizer)[0]
    assert "".join(BOOK[chunk.start : chunk.end] for chunk in document.chunks) == BOOK
    for chunk, block in zip(document.chunks, document.blocks, strict=True):
        ids = document.token_ids[chunk.first_token : chunk.last_token]
        assert ids == encode_ids(llm.tokenizer, BOOK[chunk.start : chunk.end])
        assert len(ids) <= CONFIG.chunk_length
        got, expected = block.rows(llm.model.base, 0, 1), read_behind(llm.model.base, start_ids, torch.tensor([ids]))
        assert all(torch.equal(*pair) for pair in zip(got.values, expected.values, strict=True))
    assert block.rows(llm.model.base, 0, 1).keys[0].shape[2] == len(ids)
    answer = library.ask("book", "What?", max_new_tokens=4)
    assert answer.citations
    for citation in answer.citations:
        assert citation.text == BOOK[citation.start : citation.end]
    assert answer.num_prompt_tokens == len(llm.frame("What?")[1])  # the question and nothing else


def test_what_texts_share_is_stored_once(library: Library, reads: list[int]) -> None:
    library.add(BOOK, name="one")
    stored = library.nbytes()
    reads.clear()
    assert library.add(BOOK, name="two").num_read == 0
    assert library.add(BOOK, name="one").num_read == 0
    assert not reads
    assert library.nbytes() == stored
    change = library.add(f"{BOOK}\n\n{book(1)}", name="both")
    assert change.num_read <= library.entry("both").num_chunks - library.entry("one").num_chunks + 2


def test_a_library_is_there_for_another_process(tmp_path: Path, library: Library, reads: list[int]) -> None:
    library.add(BOOK, name="book")
    answer = library.ask("book", "Who?", max_new_tokens=8)
    reads.clear()
    again = Library(library.folder, tiny())
    assert again.ask("book", "Who?", max_new_tokens=8).text == answer.text
    assert not reads


def test_adapters_do_not_matter_and_other_models_are_refused(library: Library) -> None:
    from focusllm import AdapterConfig, inject

    library.add("A short text.", name="text")
    other = tiny()
    inject(other.model.base, AdapterConfig())
    Library(library.folder, other).document("text")
    with pytest.raises(LibraryError, match=r"chunk_length 192, kv_dtype same, and this is .*kv_dtype int8; load that"):
        Library(library.folder, tiny(kv_dtype="int8"))
    changed = tiny()
    with torch.no_grad():
        next(changed.model.base.parameters())[5] += 1
    with pytest.raises(LibraryError, match="with other weights"):
        Library(library.folder, changed)
    condensing = tiny(far_context="condensed")
    assert Library(library.folder, condensing).ask("text", "What?", max_new_tokens=2).num_generated_tokens
    assert not condensing.model.settings.is_opened  # it is as it was


@pytest.mark.parametrize("kv_dtype", ["same", "int8"])
def test_what_was_evicted_is_read_again(tmp_path: Path, reads: list[int], kv_dtype: str) -> None:
    llm = tiny(kv_dtype=kv_dtype)
    library = Library(tmp_path / "library", llm)
    library.add(BOOK, name="book")
    whole, before = library.nbytes(), library.ask("book", "Who?", max_new_tokens=8)
    expected = Library(library.folder, llm).document("book")
    rows = [block.rows(llm.model.base, 0, 1) for block in expected.blocks]
    small = Library(library.folder, llm, disk_budget=whole // 2)
    assert small.gc() >= whole - whole // 2
    assert library.nbytes() <= whole // 2
    reads.clear()
    assert library.ask("book", "Who?", max_new_tokens=8).text == before.text
    small.gc()
    again = Library(library.folder, llm, disk_budget=0)
    again.gc()
    assert again.nbytes() == 0
    reads.clear()
    assert again.ask("book", "Who?", max_new_tokens=8).text == before.text
    assert len(reads) >= len(rows)
    for block, row in zip(again.document("book").blocks, rows, strict=True):
        assert torch.equal(block.rows(llm.model.base, 0, 1).keys[1], row.keys[1])


def test_least_recently_used_goes_first(library: Library) -> None:
    library.add(book(1), name="one")
    library.add(book(2), name="two")
    for age, name in ((200, "one"), (100, "two")):
        for chunk in library.content(name).chunks:
            for kind in (".rows", ".keys"):
                path = library.folder / "chunks" / chunk.key[:2] / f"{chunk.key}{kind}"
                os.utime(path, (path.stat().st_atime, path.stat().st_mtime - age))
    Library(library.folder, library.llm, disk_budget=library.nbytes() - 1000).gc()
    gone = [
        sum(
            not (library.folder / "chunks" / c.key[:2] / f"{c.key}.rows").exists() for c in library.content(name).chunks
        )
        for name in ("one", "two")
    ]
    assert gone == [1, 0]


def test_documents_in_memory_keep_to_a_budget(library: Library, llm: FocusLLM) -> None:
    for number in range(4):
        library.add(book(number, 10), name=str(number))
    held = chunk_held(library)
    tight = Library(library.folder, llm, memory_budget=2 * held)
    for name in ("0", "1", "2", "3", "0"):
        tight.document(name)
        assert name in tight._open
        assert len(tight._open) <= 3
    assert "1" not in tight._open


def chunk_held(library: Library) -> int:
    from focusllm.library.library import held_bytes

    return max(held_bytes(library.document(str(number))) for number in range(4))


def test_gc_removes_what_no_document_has(library: Library) -> None:
    library.add(BOOK, name="one")
    stored = library.nbytes()
    library.add(f"{BOOK}\n\n{book(1)}", name="two")
    library.update("one", f"{NEW}\n\n{BOOK}")
    library.remove("two")
    assert library.gc() > 0
    entry, size = library.entry("one"), library.nbytes()
    assert size <= stored * 1.1
    assert len(library.chunks.files()) == 2 * len({chunk.key for chunk in library.content("one").chunks})
    assert library.document("one").num_tokens == entry.num_tokens
    assert library.gc() == 0


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "flip":
        content[len(content) * 3 // 4] ^= 1
    path.write_bytes(content[: len(content) // 2] if how == "cut" else content if how == "flip" else b"")


@pytest.mark.parametrize("kind", [".rows", ".keys"])
@pytest.mark.parametrize("how", ["flip", "cut", "empty"])
def test_verify_finds_and_repairs(library: Library, llm: FocusLLM, reads: list[int], kind: str, how: str) -> None:
    library.add(BOOK, name="book")
    expected = Library(library.folder, llm).ask("book", "Who?", max_new_tokens=8)
    key = library.content("book").chunks[3].key
    path = library.folder / "chunks" / key[:2] / f"{key}{kind}"
    damage(path, how)
    found = library.verify()
    assert found.damaged_files == [str(path)]
    assert not found.damaged_documents
    assert not library.verify().damaged_files
    again = Library(library.folder, llm)
    assert again.ask("book", "Who?", max_new_tokens=8).text == expected.text
    for block in again.document("book").blocks:
        block.rows(llm.model.base, 0, 1)
    assert path.exists()
    assert not library.verify().damaged_files


def test_damage_that_nobody_looked_for_answers_nothing_wrong(library: Library, llm: FocusLLM) -> None:
    library.add(BOOK, name="book")
    expected = library.ask("book", "Who?", max_new_tokens=8)
    for number, file in enumerate(library.chunks.files()):
        damage(file.path, ("flip", "cut", "empty")[number % 3])
    said: list[str] = []
    answer = Library(library.folder, llm, notify=said.append).ask("book", "Who?", max_new_tokens=8)
    assert answer.text == expected.text
    assert answer.citations == expected.citations
    assert any("damaged on disk" in remark for remark in said)


def test_a_damaged_text_is_refused_or_read_anew(tmp_path: Path, library: Library) -> None:
    path = tmp_path / "book.txt"
    path.write_text(BOOK)
    library.add(path)
    library.add(BOOK, name="from nowhere")
    with sqlite3.connect(library.folder / CATALOGUE_NAME) as database:
        for name in ("book.txt", "from nowhere"):
            (kept,) = database.execute("SELECT content FROM documents WHERE name = ?", (name,)).fetchone()
            kept = kept.replace(b"Ahab", b"Bhab", 1)
            database.execute("UPDATE documents SET content = ? WHERE name = ?", (kept, name))
    database.close()
    with pytest.raises(LibraryError, match=r"keeps of book.txt is damaged; update it from .*book.txt"):
        Library(library.folder, library.llm).ask("book.txt", "Who?")
    found = library.verify()
    assert (found.damaged_documents, found.repaired_documents) == (["from nowhere"], ["book.txt"])
    assert library.content("book.txt").text == BOOK
    library.remove("from nowhere")
    assert library.add(BOOK, name="from nowhere").num_read == 0


def test_a_damaged_catalogue_is_one_sentence(library: Library, llm: FocusLLM) -> None:
    library.add(BOOK, name="book")
    path = library.folder / CATALOGUE_NAME
    whole = path.read_bytes()
    for content in (b"nonsense" * 2000, whole[: len(whole) // 2], whole[:100] + b"\xff" * 4000 + whole[4100:]):
        path.write_bytes(content)
        with pytest.raises(LibraryError, match=r"damaged|cannot be used"):
            Library(library.folder, llm).verify()
    path.unlink()
    again = Library(library.folder, llm)  # the chunks are still there
    assert again.add(BOOK, name="book").num_read == 0


def test_sets(library: Library) -> None:
    for number in range(3):
        library.add(book(number, 8), name=f"{number}.txt", into="sea" if number else None)
    assert library.sets() == {"sea": ["1.txt", "2.txt"]}
    answer = library.ask("sea", "Who?", max_new_tokens=4)
    assert {citation.document for citation in answer.citations} <= {"1.txt", "2.txt"}
    assert [document.name for document in library.documents("sea")] == ["1.txt", "2.txt"]
    assert library.ask(None, "Who?", max_new_tokens=4).num_document_tokens > answer.num_document_tokens
    library.put_into("sea", "0.txt")
    library.take_out("sea", ["1.txt", "2.txt"])
    assert library.sets() == {"sea": ["0.txt"]}
    with pytest.raises(LibraryError, match="sea is a set of documents already"):
        library.add("Some text.", name="sea")
    with pytest.raises(LibraryError, match=r"0.txt is a document already"):
        library.put_into("0.txt", "1.txt")
    library.remove("sea")
    assert library.sets() == {}
    assert library.names() == ["1.txt", "2.txt"]


def test_documents_of_a_library_and_others_are_asked_together(library: Library, llm: FocusLLM) -> None:
    library.add(BOOK, name="book")
    other = llm.read_text(book(5, 20), name="other")
    answer = llm.ask([library.document("book"), other], "Who?", max_new_tokens=4)
    assert {citation.document for citation in answer.citations} <= {"book", "other"}
    assert answer.num_document_tokens == library.document("book").num_tokens + other.num_tokens


def test_bad_input_changes_nothing(
    tmp_path: Path, library: Library, llm: FocusLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    library.add(BOOK, name="book")
    before = (library.entries(), library.nbytes())
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "broken.pdf").write_bytes(b"%PDF-1.7 nothing")
    bad: list[tuple[Callable[[], object], type[Exception], str]] = [
        (lambda: library.ask("bock", "Who?"), LibraryError, "there is no document 'bock'; did you mean book"),
        (lambda: library.ask([], "Who?"), ConfigError, "no documents"),
        (lambda: library.ask("book", " "), DocumentError, "the question is empty"),
        (lambda: library.remove(["book", "other"]), LibraryError, "no document 'other'"),
        (lambda: library.update("book"), LibraryError, "was not read from a file"),
        (lambda: library.add(book(1), name="book"), LibraryError, "another text; update it"),
        (lambda: library.add(tmp_path / "empty.txt"), DocumentError, "has no text"),
        (lambda: library.add(tmp_path / "broken.pdf"), DocumentError, "broken.pdf"),
        (lambda: library.add(tmp_path / "missing.txt"), DocumentError, "no file"),
        (lambda: library.update("book", tmp_path / "empty.txt"), DocumentError, "has no text"),
        (lambda: Library(tmp_path / "nowhere"), LibraryError, "there is no library in"),
        (lambda: Library(tmp_path, llm), LibraryError, "is not a library and has other files"),
        (lambda: Library(tmp_path / "empty.txt", llm), LibraryError, "is a file"),
        (lambda: Library(library.folder).ask("book", "Who?"), LibraryError, "without a model"),
    ]
    for call, kind, words in bad:
        with pytest.raises(kind, match=words):
            call()
    monkeypatch.setattr("focusllm.memory.cost.free_memory", lambda _: 1000)
    with pytest.raises(MemoryLimitError, match="needs about"):
        library.add(book(7), name="large")
    monkeypatch.undo()
    assert (library.entries(), library.nbytes()) == before
    with sqlite3.connect(library.folder / CATALOGUE_NAME) as database:
        database.execute("PRAGMA user_version = 9")
    database.close()
    with pytest.raises(LibraryError, match="has format 9 and this version of FocusLLM knows 1; use a newer"):
        Library(library.folder, llm)


def test_a_full_disk_keeps_what_was_read(library: Library, monkeypatch: pytest.MonkeyPatch, reads: list[int]) -> None:
    import errno

    from focusllm.memory.chunk_file import ChunkFile
    from focusllm.memory.store import cannot_write

    write, written = ChunkFile.write, []

    def full(self: ChunkFile, *arguments: object) -> None:
        if len(written) == 10:
            raise cannot_write(self.path, self.path.parent, OSError(errno.ENOSPC, "no space"), 1)
        written.append(write(self, *arguments))

    monkeypatch.setattr(ChunkFile, "write", full)
    with pytest.raises(DocumentError, match=r"still needed.*What is written is kept: make room and read again"):
        library.add(BOOK, name="book")
    monkeypatch.setattr(ChunkFile, "write", write)
    reads.clear()
    change = library.add(BOOK, name="book")
    assert change.num_read == change.entry.num_chunks - 10


def test_threads_share_a_library(library: Library, llm: FocusLLM) -> None:
    for number in range(3):
        library.add(book(number, 12), name=str(number))
    alone = {str(n): library.ask(str(n), "Who?", max_new_tokens=6).text for n in range(3)}
    fresh, failed = Library(library.folder, llm), list[BaseException]()

    def work(name: str) -> None:
        try:
            for turn in range(3):
                assert fresh.ask(name, "Who?", max_new_tokens=6).text == alone[name]
                fresh.add(book(20 + turn, 6), name=f"{name} {turn}")
                fresh.update(f"{name} {turn}", book(40 + turn, 6))
                fresh.gc()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len(fresh.entries()) == 3 + 9
