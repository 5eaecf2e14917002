"""Uploaded files and vector stores: the real server, the real client, tiny models."""

from __future__ import annotations

import base64
import io
import json
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from focusllm import Library
from focusllm.errors import LibraryError
from focusllm.serving.job import Done, Event, Job, Piece, Prompt
from focusllm.serving.keys import Keys
from focusllm.serving.sampling import Sampling
from focusllm.serving.scheduler import Scheduler
from focusllm.serving.worker import Worker

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")
from focusllm.serving.api_errors import ApiError  # noqa: E402
from focusllm.serving.file_catalogue import StoredFile, VectorStore  # noqa: E402
from focusllm.serving.files import Files, shown_name  # noqa: E402
from test_server import Running, clients_end, running, tiny, user  # noqa: E402, F401

BOOK = "".join(f"Day {i}: the cook found thing {i * 7} in the galley.\n" for i in range(40))
OTHER = "".join(f"Night {i}: the mate lost thing {i * 9} in the hold.\n" for i in range(30))
ASKED = "What did the cook find on day 3?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files") / "library"


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Running]:
    with running(library=Library(folder, tiny())) as found:
        yield found


def upload(client: Any, text: str | bytes, name: str = "book.txt") -> Any:
    return client.files.create(file=(name, text if isinstance(text, bytes) else text.encode()), purpose="assistants")


def file_part(**file: str) -> list[dict[str, Any]]:
    return [{"type": "file", "file": file}, {"type": "text", "text": ASKED}]


def asked(client: Any, content: Any, **more: Any) -> Any:
    messages = [{"role": "user", "content": content}]
    return client.chat.completions.create(model="tiny", messages=messages, max_tokens=12, extra_body=more)


def test_files_come_and_go(served: Running) -> None:
    client = served.client()
    first, second = upload(client, BOOK), upload(client, OTHER, "other.txt")
    assert (first.filename, first.bytes, first.status, first.purpose) == (
        "book.txt",
        len(BOOK),
        "uploaded",
        "assistants",
    )
    assert [file.id for file in client.files.list(order="asc", limit=1)][-2:] == [first.id, second.id]
    assert [file.id for file in client.files.list()][:2] == [second.id, first.id]
    assert client.files.retrieve(first.id).id == first.id
    assert client.files.content(first.id).content == BOOK.encode()
    assert client.files.delete(second.id).deleted
    for gone in (second.id, "file-none", "../catalogue.sqlite"):
        with pytest.raises(openai.NotFoundError):
            client.files.retrieve(gone)
    with pytest.raises(openai.NotFoundError):
        client.files.content(second.id)


def test_a_file_is_read_and_asked(served: Running) -> None:
    """By its id, in a vector store, and sent along: the same chunks, the same answer, cited as its file."""
    client = served.client()
    store = client.vector_stores.create(name="logs", metadata={"year": "1851"})
    file = client.vector_stores.files.upload_and_poll(vector_store_id=store.id, file=("book.txt", BOOK.encode()))
    assert (file.status, file.last_error, file.usage_bytes) == ("completed", None, len(BOOK))
    assert client.files.retrieve(file.id).status == "processed"
    by_id = asked(client, file_part(file_id=file.id))
    by_store = asked(client, ASKED, vector_store_ids=[store.id])
    assert by_id.choices[0].message.content == by_store.choices[0].message.content
    assert by_id.usage.prompt_tokens_details.cached_tokens > len(BOOK) / 2
    for answer in (by_id, by_store):
        citation = answer.choices[0].message.citations[0]
        assert (citation["document"], citation["file_id"]) == ("book.txt", file.id)
        assert BOOK[citation["start"] : citation["end"]] == citation["text"]
    sent = base64.b64encode(BOOK.encode()).decode()
    for data in (sent, f"data:text/plain;base64,{sent}"):
        along = asked(client, file_part(file_data=data, filename="log.txt"))
        assert along.choices[0].message.citations[0]["document"] == "log.txt"
        assert "file_id" not in along.choices[0].message.citations[0]
    page = client.get(f"/vector_stores/{store.id}/files/{file.id}/content", cast_to=object)
    assert page["data"] == [{"type": "text", "text": BOOK}]
    assert (page["chunks"][0]["start"], page["chunks"][-1]["end"]) == (0, len(BOOK))
    found = client.vector_stores.retrieve(store.id)
    assert (found.name, found.metadata, found.usage_bytes) == ("logs", {"year": "1851"}, len(BOOK))
    assert (found.status, found.file_counts.completed, found.file_counts.total) == ("completed", 1, 1)
    assert client.vector_stores.update(store.id, name="log").name == "log"
    assert [one.id for one in client.vector_stores.files.list(store.id)] == [file.id]
    assert client.vector_stores.files.delete(file.id, vector_store_id=store.id).deleted
    assert client.vector_stores.retrieve(store.id).file_counts.total == 0
    assert client.files.retrieve(file.id).id == file.id
    assert client.vector_stores.delete(store.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.vector_stores.retrieve(store.id)


def test_a_deleted_file_is_in_no_store_and_not_in_the_library(served: Running, folder: Path) -> None:
    client = served.client()
    store = client.vector_stores.create(file_ids=[upload(client, BOOK).id, upload(client, OTHER).id])
    kept, gone = (file.id for file in client.vector_stores.files.list(store.id))
    for file in (kept, gone):
        assert client.vector_stores.files.poll(file, vector_store_id=store.id).status == "completed"
    client.files.delete(gone)
    assert [file.id for file in client.vector_stores.files.list(store.id)] == [kept]
    names = [entry.name for entry in Library(folder, read_only=True).entries()]
    assert kept in names
    assert gone not in names
    assert not list((folder / "uploads").glob(f"{gone}*"))
    with pytest.raises(openai.NotFoundError, match="There is no file"):
        asked(client, file_part(file_id=gone))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.pdf", b"%PDF-1.4 nothing", "a.pdf"),
        ("a.docx", b"PK\x03\x04 no archive", "a.docx"),
        ("a.bin", bytes(range(256)) * 20, "a.bin"),
        ("a.txt", b" \n ", "a.txt"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(served: Running, name: str, content: bytes, said: str) -> None:
    client = served.client()
    store = client.vector_stores.create()
    file = client.vector_stores.files.upload_and_poll(vector_store_id=store.id, file=(name, content))
    assert file.status == "failed"
    assert file.last_error.code == "unsupported_file"
    assert said in file.last_error.message
    assert "uploads" not in file.last_error.message
    assert client.vector_stores.retrieve(store.id).file_counts.failed == 1
    with pytest.raises(openai.BadRequestError, match="cannot be asked"):
        asked(client, file_part(file_id=file.id))
    with pytest.raises(openai.BadRequestError, match="has not been read yet"):
        client.get(f"/vector_stores/{store.id}/files/{file.id}/content", cast_to=object)
    with pytest.raises(openai.BadRequestError):
        asked(client, file_part(file_data=base64.b64encode(content).decode(), filename=name))


BAD: list[tuple[str, str, Any, int]] = [
    ("POST", "/v1/vector_stores", {"file_ids": ["file-none"]}, 404),
    ("POST", "/v1/vector_stores", {"name": 5}, 400),
    ("POST", "/v1/vector_stores", {"expires_after": {"anchor": "last_active_at", "days": 1}}, 400),
    ("POST", "/v1/vector_stores", {"chunking_strategy": {"type": "static"}}, 400),
    ("POST", "/v1/vector_stores/vs_none/files", {"file_id": "file-none"}, 404),
    ("POST", "/v1/vector_stores/vs_none", {"name": "a"}, 404),
    ("GET", "/v1/vector_stores/vs_none/files/file-none", None, 404),
    ("DELETE", "/v1/files/file-none", None, 404),
    ("GET", "/v1/files?limit=0", None, 400),
    ("GET", "/v1/files?limit=x", None, 400),
    ("GET", "/v1/files?order=up", None, 400),
    ("GET", "/v1/files?after=file-none", None, 404),
    ("GET", "/v1/files?before=file-none", None, 404),
    ("GET", "/v1/vector_stores/vs_none/files?filter=odd", None, 400),
    ("POST", "/v1/vector_stores", {"metadata": {"a": float("nan")}}, 400),
    ("POST", "/v1/vector_stores", {"metadata": {"a": {"b": "c"}}}, 400),
    ("POST", "/v1/vector_stores", {"metadata": {"a" * 65: "c"}}, 400),
    ("POST", "/v1/vector_stores", {"metadata": {str(n): "" for n in range(17)}}, 400),
    ("POST", "/v1/vector_stores", {"name": "\ud800"}, 400),
    ("POST", "/v1/vector_stores/vs_none/files", {"file_id": "a", "attributes": {"a": float("inf")}}, 400),
    ("POST", "/v1/vector_stores/vs_none/files", {"file_id": "a", "attributes": {"a": [1]}}, 400),
    ("POST", "/v1/files", {"file": "a"}, 400),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_bad_requests(served: Running, number: int) -> None:
    method, path, body, status = BAD[number]
    raw = json.dumps(body).encode() if body is not None else None
    found, _, answer = served.send(method, path, raw, {"Content-Type": "application/json"})
    assert found == status, answer
    assert json.loads(answer)["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"purpose": "assistants"}, "file is missing"),
        ({"file": ("a.txt", b"a")}, "purpose is missing"),
        ({"file": ("a.txt", b"a"), "purpose": "batch"}, "'batch' is not supported"),
        ({"file": ("a.txt", b"a"), "purpose": "assistants", "expires_after[anchor]": "created_at"}, "expires_after"),
        ({"file": ("a.txt", b""), "purpose": "assistants"}, "is empty"),
    ],
)
def test_bad_uploads(served: Running, fields: dict[str, Any], said: str) -> None:
    lines = list[bytes]()
    for name, value in fields.items():
        filename = f'; filename="{value[0]}"' if isinstance(value, tuple) else ""
        content = value[1] if isinstance(value, tuple) else value.encode()
        head = f'--x\r\nContent-Disposition: form-data; name="{name}"{filename}\r\n\r\n'
        lines += [head.encode(), content, b"\r\n"]
    body = b"".join([*lines, b"--x--\r\n"])
    status, _, answer = served.send("POST", "/v1/files", body, {"Content-Type": "multipart/form-data; boundary=x"})
    assert status == 400
    assert said in json.loads(answer)["error"]["message"]


def test_a_message_with_a_file_that_is_none(served: Running) -> None:
    client = served.client()
    for file in ({}, {"file_id": "a", "file_data": "b"}, {"file_data": "*", "filename": "a.txt"}):
        with pytest.raises(openai.BadRequestError):
            asked(client, file_part(**file))


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\temp\\a.txt", "a.txt"),
        ("a\x00b\n.txt", "a\\x00b\\n.txt"),
        ("é" * 300 + ".txt", "é" * 251 + ".txt"),
        ("/", "file"),
        ("\ud800.txt", "\\ud800.txt"),
    ],
)
def test_names_are_names(given: str, kept: str) -> None:
    assert shown_name(given) == kept


def test_names_from_outside_stay_inside(served: Running, folder: Path) -> None:
    client = served.client()
    before = {path.relative_to(folder.parent) for path in folder.parent.rglob("*")}
    file = upload(client, BOOK, "../../../escaped.txt")
    assert file.filename == "escaped.txt"
    new = {path.relative_to(folder.parent) for path in folder.parent.rglob("*")} - before
    assert {path.parent for path in new if "sqlite" not in path.name} == {Path("library/uploads")}
    client.files.delete(file.id)


def test_every_key_has_its_own(tmp_path: Path) -> None:
    path = tmp_path / "keys.txt"
    ann, bob = Keys.create(path, "ann"), Keys.create(path, "bob")
    with running(Keys.load(path), Library(tmp_path / "library", tiny())) as served:
        one, other = served.client(ann), served.client(bob)
        store = one.vector_stores.create(name="mine")
        file = one.vector_stores.files.upload_and_poll(vector_store_id=store.id, file=("a.txt", BOOK.encode()))
        assert not list(other.files.list())
        assert not list(other.vector_stores.list())
        for refused in (
            lambda: other.files.retrieve(file.id),
            lambda: other.files.content(file.id),
            lambda: other.files.delete(file.id),
            lambda: other.vector_stores.retrieve(store.id),
            lambda: other.vector_stores.files.list(store.id),
            lambda: other.vector_stores.create(file_ids=[file.id]),
            lambda: asked(other, file_part(file_id=file.id)),
            lambda: asked(other, ASKED, vector_store_ids=[store.id]),
        ):
            with pytest.raises(openai.NotFoundError):
                refused()
        assert asked(one, ASKED, vector_store_ids=[store.id]).choices[0].message.citations
        same = upload(other, BOOK)
        own = other.vector_stores.create(file_ids=[same.id])
        assert other.vector_stores.files.poll(same.id, vector_store_id=own.id).status == "completed"
        content = Library(tmp_path / "library", read_only=True).content(file.id)
        rows = list((tmp_path / "library" / "chunks").rglob("*.rows"))
        assert len(rows) == len({chunk.key for chunk in content.chunks})  # what both have is read and kept once


def test_after_a_restart_all_is_there_and_reading_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "library"
    with running(library=Library(folder, tiny())) as served:
        client = served.client()
        store = client.vector_stores.create(name="logs")
        done = client.vector_stores.files.upload_and_poll(vector_store_id=store.id, file=("a.txt", BOOK.encode()))
        answer = asked(client, file_part(file_id=done.id)).choices[0].message.content
    files = Files(Library(folder, tiny()))  # one that was killed before it read, and left what no row speaks of
    late = files.upload("", "late.txt", "assistants", io.BytesIO(OTHER.encode()))
    files.put_into(files.store(store.id, ""), [late], {})
    (folder / "uploads" / "file-000000000000000000000000.txt").write_text("no row")
    (folder / "uploads" / ".part-file-1").write_text("half")
    for path in (folder / "uploads").glob("*file-*"):
        os.utime(path, (1, 1))
    (folder / "uploads" / "file-000000000000000000000002.txt").write_text("another server is at it")
    files.library.add(BOOK, name="file-000000000000000000000001")
    with running(library=Library(folder, tiny())) as served:
        client = served.client()
        assert client.vector_stores.files.poll(late.id, vector_store_id=store.id).status == "completed"
        again = asked(client, file_part(file_id=done.id))
        assert again.choices[0].message.content == answer
        under_way = "file-000000000000000000000002"
        assert {path.stem for path in (folder / "uploads").iterdir()} == {done.id, late.id, under_way}
        assert {entry.name for entry in Library(folder, read_only=True).entries()} == {done.id, late.id}


def test_what_was_evicted_is_read_again(served: Running, folder: Path) -> None:
    client = served.client()
    store = client.vector_stores.create()
    file = client.vector_stores.files.upload_and_poll(vector_store_id=store.id, file=("c.txt", (OTHER + BOOK).encode()))
    before = asked(client, file_part(file_id=file.id)).choices[0].message.content
    for path in [*(folder / "chunks").rglob("*.rows"), *(folder / "chunks").rglob("*.keys")]:
        path.unlink()
    with running(library=Library(folder, tiny())) as other:
        assert asked(other.client(), file_part(file_id=file.id)).choices[0].message.content == before


def test_a_server_without_a_library_keeps_no_files() -> None:
    with running() as served:
        with pytest.raises(openai.BadRequestError, match="no library, so it keeps no files; see --library"):
            upload(served.client(), BOOK)
        with pytest.raises(openai.BadRequestError, match="keeps no files"):
            asked(served.client(), file_part(file_id="file-1"))


def test_uploads_are_limited_as_they_come(tmp_path: Path) -> None:
    with running(library=Library(tmp_path / "library", tiny()), max_body=20_000) as served:
        with pytest.raises(openai.APIStatusError) as refused:
            upload(served.client(), b"a" * 30_000)
        assert refused.value.status_code == 413
        assert upload(served.client(), b"a" * 10_000).bytes == 10_000


def test_reading_takes_turns_with_requests() -> None:
    """A step does one task or one chunk, in turns, and then a token of what is decoded."""
    llm, order = tiny(), list[str]()
    worker = Worker(llm.model, llm.tokenizer, Scheduler())

    def told(name: str) -> Any:
        def emit(event: Event) -> None:
            if isinstance(event, Piece):
                order.append(name)

        return emit

    ids = llm.tokenizer(BOOK).input_ids
    decoding = Job(Prompt.of(ids[:30], worker.config), Sampling(max_tokens=40, ignore_eos=True), told("token"))
    worker.submit(decoding)
    while not order:
        worker.step()
    order.clear()
    worker.scheduler.spent = lambda reading, decoding: None  # type: ignore[method-assign]  # whatever a step takes
    chunk = worker.chunks.block
    worker.chunks.block = lambda *a: (order.append("chunk"), chunk(*a))[1]  # type: ignore[method-assign]
    worker.submit(Job(Prompt.of(ids[:400], worker.config), Sampling(max_tokens=1), told("late")))
    for _ in range(4):
        worker.scheduler.tasks.append(lambda: order.append("task"))
    for _ in range(8):
        worker.step()
    turns = [what for what in order if what in ("task", "chunk")]
    assert turns == ["task", "chunk"] * 4
    assert order == [what for turn in turns for what in (turn, "token")]


def test_work_of_other_threads_is_done_by_the_worker() -> None:
    llm = tiny()
    worker = Worker(llm.model, llm.tokenizer)
    assert worker.run(threading.get_ident) == threading.get_ident()  # nobody works yet
    worker.start()
    done = threading.Event()
    job = Job(Prompt.of([5, 6], worker.config), Sampling(max_tokens=1), lambda e: isinstance(e, Done) and done.set())
    worker.submit(job)
    assert worker.run(threading.get_ident) not in (threading.get_ident(), None)
    assert worker.run(lambda: worker.run(lambda: 5)) == 5
    with pytest.raises(ZeroDivisionError):
        worker.run(lambda: 1 / 0)  # type: ignore[arg-type,return-value]
    assert done.wait(30)
    worker.close()
    with pytest.raises(Exception, match="shutting down"):
        worker.run(time.monotonic)


def test_system_and_user_stay_text_beside_files(served: Running) -> None:
    client = served.client()
    file = upload(client, BOOK)
    messages = [{"role": "system", "content": "Be brief."}, *user(ASKED)]
    messages[1]["content"] = file_part(file_id=file.id)  # type: ignore[assignment]
    answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=3)  # type: ignore[arg-type]
    assert answer.choices[0].message.citations[0]["file_id"] == file.id


def test_lists_are_paged_in_both_directions(served: Running) -> None:
    client = served.client()
    stores = [client.vector_stores.create(name=str(n)).id for n in range(4)]
    newest = [store.id for store in client.vector_stores.list(limit=1)][:4]
    assert newest == stores[::-1]
    page = client.vector_stores.list(limit=2, before=newest[3])
    assert ([store.id for store in page.data], page.has_more) == (newest[1:3], True)
    page = client.vector_stores.list(limit=5, after=newest[0], before=newest[3])
    assert ([store.id for store in page.data], page.has_more) == (newest[1:3], False)


def test_a_store_without_a_file_to_ask(served: Running) -> None:
    client = served.client()
    store = client.vector_stores.create()
    assert asked(client, ASKED, vector_store_ids=[store.id]).choices[0].message.content
    file = client.vector_stores.files.upload_and_poll(vector_store_id=store.id, file=("a.bin", bytes(range(256)) * 20))
    assert file.status == "failed"
    assert asked(client, ASKED, vector_store_ids=[store.id]).choices[0].message.content


def test_a_file_longer_than_a_prompt_is_not_read(tmp_path: Path) -> None:
    folder = tmp_path / "library"
    with running(library=Library(folder, tiny()), max_prompt_tokens=800) as served:
        client = served.client()
        store = client.vector_stores.create()
        file = client.vector_stores.files.upload_and_poll(vector_store_id=store.id, file=("a.txt", BOOK.encode()))
        assert file.status == "failed"
        assert "more than the 800" in file.last_error.message
        with pytest.raises(openai.BadRequestError, match="more than the 800"):
            asked(client, file_part(file_id=file.id))
        assert not Library(folder, read_only=True).entries()


def test_a_file_removed_twice_at_once_is_gone(tmp_path: Path) -> None:
    files = Files(Library(tmp_path / "library", tiny()))
    file = files.upload("", "a.txt", "assistants", io.BytesIO(BOOK.encode()))
    files.documents("", [file.id])
    for _ in range(2):  # both have seen it
        files.remove(file)
    assert not files.library.entries()
    assert not list(files.folder.iterdir())
    store = VectorStore("vs_1", "", "", 0, {})
    with pytest.raises(ApiError, match="There is no vector store"):
        files.put_into(store, [file], {})
    files.catalogue.add_store(store)
    with pytest.raises(ApiError, match="There is no file"):
        files.put_into(store, [file], {})


@pytest.mark.parametrize("moment", ["before", "after"])
def test_nothing_stays_of_a_file_that_is_removed_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Before or after its document is put into the library."""
    files = Files(Library(tmp_path / "library", tiny()))
    file = files.upload("", "a.txt", "assistants", io.BytesIO(BOOK.encode()))
    add = files.library.add

    def removing(*given: Any, **named: Any) -> Any:
        if moment == "before":
            files.remove(file)
        change = add(*given, **named)
        if moment == "after":
            files.remove(file)
        return change

    monkeypatch.setattr(files.library, "add", removing)
    with pytest.raises(ApiError) as refused:
        files.documents("", [file.id])
    assert refused.value.status_code == 404
    assert not files.library.entries()
    assert not list(files.folder.iterdir())


def test_no_wish_is_overheard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """One that comes while the reader looks, and one behind a catalogue that cannot be used for once."""
    files = Files(Library(tmp_path / "library", tiny()))
    store = VectorStore("vs_1", "", "", 0, {})
    files.catalogue.add_store(store)
    pending = [files.upload("", "a.txt", "assistants", io.BytesIO(text.encode())) for text in (BOOK, OTHER)]
    wanted, look = list(pending), files.catalogue.files

    def looked(owner: str | None = None) -> list[StoredFile]:
        if threading.current_thread().name != "focusllm-files" or not wanted:
            return look(owner)
        found = look(owner)
        files.put_into(store, [wanted.pop()], {})
        if not wanted:
            raise LibraryError("the disk is full.")
        return found

    monkeypatch.setattr(files.catalogue, "files", looked)
    files.start()
    end = time.monotonic() + 20  # less than the reader waits if nobody tells it
    while any(files.file(file.id, "").status != "completed" for file in pending) and time.monotonic() < end:
        time.sleep(0.01)
    files.close()
    assert [files.file(file.id, "").status for file in pending] == ["completed"] * 2
    assert "the disk is full" in caplog.text


def test_forms_of_other_sites_are_refused(served: Running, tmp_path: Path) -> None:
    """Which browsers send without asking; what needs a key is safe from them."""
    body = b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nassistants\r\n--x--\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=x", "Sec-Fetch-Site": "cross-site"}
    assert served.send("POST", "/v1/files", body, headers)[0] == 403
    assert served.send("GET", "/v1/files", None, headers)[0] == 200
    assert served.send("POST", "/v1/files", body, {**headers, "Sec-Fetch-Site": "same-origin"})[0] == 400


def test_servers_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one has taken another reads, too, and a new one removes nothing that is under way."""
    monkeypatch.setattr("focusllm.serving.files.LOOK_SECONDS", 0.05)
    one = Files(Library(tmp_path / "library", tiny()))
    file = one.upload("", "a.txt", "assistants", io.BytesIO(BOOK.encode()))
    other = Files(Library(tmp_path / "library", tiny()))
    other.start()
    try:
        store = VectorStore("vs_1", "", "", 0, {})
        one.catalogue.add_store(store)
        one.put_into(store, [file], {})
        end = time.monotonic() + 60
        while one.file(file.id, "").status != "completed" and time.monotonic() < end:
            time.sleep(0.01)
        assert one.documents("", [file.id])[0].text == BOOK
    finally:
        other.close()


def test_requests_that_read_leave_threads_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many wait for a file that is not read yet, other routes answer."""
    is_read, waiting = threading.Event(), threading.Semaphore(0)
    documents = Files.documents

    def held(self: Files, *arguments: Any) -> Any:
        waiting.release()
        assert is_read.wait(60)
        return documents(self, *arguments)

    with running(library=Library(tmp_path / "library", tiny()), max_running=2, max_waiting=64) as served:
        client = served.client()
        file = upload(client, BOOK)
        monkeypatch.setattr(Files, "documents", held)
        with ThreadPoolExecutor(50) as threads:
            asking = [threads.submit(asked, client, file_part(file_id=file.id)) for _ in range(50)]
            assert waiting.acquire(timeout=30)
            assert waiting.acquire(timeout=30)
            assert not waiting.acquire(timeout=0.3)
            assert client.files.retrieve(file.id).id == file.id
            assert client.chat.completions.create(model="tiny", messages=user("Hi"), max_tokens=2).choices
            is_read.set()
            assert len({one.result(60).choices[0].message.content for one in asking}) == 1


def test_what_was_removed_in_the_library_is_read_again(served: Running, folder: Path) -> None:
    """The upload is kept, whoever works on the library."""
    client = served.client()
    store = client.vector_stores.create()
    file = client.vector_stores.files.upload_and_poll(vector_store_id=store.id, file=("d.txt", OTHER.encode()))
    before = asked(client, file_part(file_id=file.id)).choices[0].message.content
    Library(folder, tiny()).remove(file.id)
    assert asked(client, file_part(file_id=file.id)).choices[0].message.content == before


def test_deleting_a_file_stops_its_reading(tmp_path: Path) -> None:
    library = Library(tmp_path / "library", tiny())
    files = Files(library)
    file = files.upload("", "book.txt", "assistants", io.BytesIO(BOOK.encode()))
    files.put_into(files.store(_store_of(files), ""), [file], {})
    reads = list[int]()

    def run(work: Any) -> Any:
        reads.append(1)
        if len(reads) == 3:
            files.catalogue.remove_file(file.id)
        return work()

    library.run = run
    with pytest.raises(ApiError, match="any more"):
        files._read(file)
    assert len(reads) == 3
    assert not library.entries()
    assert not library._open


def _store_of(files: Files) -> str:
    store = VectorStore("vs_1", "", "", 0, {})
    files.catalogue.add_store(store)
    return store.id
