"""Keys and values in fewer bits and on disk: how exact, what is damaged, what is read again."""

from __future__ import annotations

import errno
import json
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from conftest import SMALL, build, random_ids, with_candidates
from focusllm import DocumentError, FocusConfig, FocusLLM, MemoryLimitError
from focusllm.decoding.engine import Request, decode, prefill, start_request
from focusllm.memory import chunks
from focusllm.memory.chunking import cut, split
from focusllm.memory.chunks import ChunkBlock, Place, document_key, encode
from focusllm.memory.cost import check_read
from focusllm.memory.store import DamagedRow, Packed, Packing, RowFile
from focusllm.method.kv import KV, concat

IDS = random_ids(24 + 5 * SMALL.stride + 6)  # six full chunks and one of 7, the first of them shared
BITS = {"same": 0.0, "int8": 1 / 127, "int4": 1 / 15}


def rows_of(model: nn.Module, blocks: list[ChunkBlock]) -> list[KV]:
    return [block.rows(model, 0, block.num_chunks) for block in blocks]


def difference(got: list[KV], expected: list[KV]) -> float:
    """The largest error as a share of the largest number of its token and head."""
    worst = 0.0
    for a, b in zip(got, expected, strict=True):
        for x, y in zip((*a.keys, *a.values), (*b.keys, *b.values), strict=True):
            spread = 2 * y.abs().amax(-1, keepdim=True).float()
            worst = max(worst, float(((x - y).float().abs() / spread).max()))
    return worst


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_dtype", ["same", "int8", "int4"])
@pytest.mark.parametrize("kind", ["device", "host", "disk"])
def test_rows_come_back(tmp_path: Path, kind: str, kv_dtype: str, dtype: torch.dtype) -> None:
    model = build(dtype=dtype)
    config = SMALL.replace(kv_dtype=kv_dtype)
    plain = rows_of(model, encode(model, IDS, SMALL))
    blocks = encode(model, IDS, config, place=Place(kind, tmp_path))
    got = rows_of(model, blocks)
    assert got[0].keys[0].dtype == dtype
    bound = BITS[kv_dtype] / 2 + (0.006 if dtype == torch.bfloat16 and kv_dtype != "same" else 1e-3 * BITS[kv_dtype])
    assert difference(got, plain) <= bound
    if kv_dtype != "same":
        assert difference(got, plain) > 0  # it is packed
    one = blocks[0].part(2, 5).rows(model, 1, 2)
    assert torch.equal(one.values[1], got[0].values[1][3:4])
    bytes_each = Packing.of(model, kv_dtype).row_bytes(24)
    held = 0 if kind == "disk" else bytes_each * 6
    assert blocks[0].kv.nbytes == held
    assert bytes_each <= {"same": 1, "int8": 0.6, "int4": 0.6}[kv_dtype] * Packing.of(model, "same").row_bytes(24)


def begin(model: nn.Module, config: FocusConfig, place: Place) -> tuple[Request, torch.Tensor]:
    far, local = split(random_ids(len(IDS) + 20), config)
    request = start_request(model, encode(model, far, config, place=place), local, config)
    return request, prefill(model, request, config)[-1]


@pytest.mark.parametrize("refresh_rows", [None, 2, 12])
@pytest.mark.parametrize("decoding", ["cached", "exact"])
@pytest.mark.parametrize("kind", ["host", "disk"])
def test_decoding_does_not_care_where_rows_lie(
    llama: nn.Module, tmp_path: Path, kind: str, decoding: str, refresh_rows: int | None
) -> None:
    config = SMALL.replace(decoding=decoding, refresh_rows=refresh_rows)
    here, first = begin(llama, config, Place())
    there, other = begin(llama, config, Place(kind, tmp_path))
    torch.testing.assert_close(other, first, rtol=1e-4, atol=2e-5)
    for token in random_ids(30, seed=1):  # past the local context, too
        expected = decode(llama, [here], [token], config)
        torch.testing.assert_close(decode(llama, [there], [token], config), expected, rtol=1e-4, atol=2e-5)
    assert here.num_chunks == there.num_chunks > 7


@pytest.mark.parametrize("kv_dtype", ["same", "int8"])
def test_few_chunks_are_brought_once_for_a_question(
    llama: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kv_dtype: str
) -> None:
    config = SMALL.replace(kv_dtype=kv_dtype, refresh_rows=12, rechunk=False)
    request, _ = begin(llama, config, Place("disk" if kv_dtype == "same" else "device", tmp_path))
    for store in (RowFile, Packed):
        monkeypatch.setattr(store, "rows", lambda *_: pytest.fail("it was brought again"))
    monkeypatch.setattr(RowFile, "read", lambda *_: pytest.fail("it was read again"))
    for token in random_ids(4, seed=1):
        decode(llama, [request], [token], config)
    assert sorted(request.refreshed_slots) == list(range(request.num_chunks))


def test_what_is_in_a_named_file_is_not_read_again(
    llama: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place("disk", tmp_path, document_key(llama, IDS, SMALL))
    before = rows_of(llama, encode(llama, IDS, SMALL, place=place))
    monkeypatch.setattr(chunks, "read_behind", lambda *_: pytest.fail("it was read again"))
    after = rows_of(llama, encode(llama, IDS, SMALL, place=place))
    assert difference(after, before) == 0


def test_a_read_that_was_broken_off_goes_on(llama: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place("disk", tmp_path, "book")

    def stop(done: int, total: int) -> None:
        if done >= 24 + 3 * SMALL.stride:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode(llama, IDS, SMALL, stop, place)
    read = []
    whole = chunks.read_behind
    monkeypatch.setattr(chunks, "read_behind", lambda *given: (read.append(len(given[2])), whole(*given))[1])
    got = rows_of(llama, encode(llama, IDS, SMALL, place=place))
    assert read == [2, 1]  # two full chunks and the short one were left
    assert difference(got, rows_of(llama, encode(llama, IDS, SMALL))) == 0


def test_another_text_under_the_same_name_is_read(llama: nn.Module, tmp_path: Path) -> None:
    place = Place("disk", tmp_path, "book")
    encode(llama, IDS, SMALL, place=place)
    changed = [*IDS[:30], 9, *IDS[31:]]
    got = rows_of(llama, encode(llama, changed, SMALL, place=place))
    assert difference(got, rows_of(llama, encode(llama, changed, SMALL))) == 0


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "changed":
        at = len(content) // 2
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    elif how == "cut":
        os.truncate(path, len(content) - 100)
    else:
        os.truncate(path, 4096)


@pytest.mark.parametrize("how", ["changed", "cut", "emptied"])
def test_damaged_rows_are_read_again_and_said(llama: nn.Module, tmp_path: Path, how: str) -> None:
    expected = rows_of(llama, encode(llama, IDS, SMALL))
    said: list[str] = []
    blocks = encode(llama, IDS, SMALL, place=Place("disk", tmp_path, "book"), notify=said.append)
    damage(tmp_path / "book-24.rows", how)
    assert difference(rows_of(llama, blocks), expected) == 0
    assert len(said) == (6 if how == "emptied" else 1)
    assert "damaged on disk" in said[0]
    assert difference(rows_of(llama, blocks), expected) == 0
    assert len(said) == (6 if how == "emptied" else 1)  # it was mended


def test_the_next_batch_is_read_from_disk_meanwhile(
    llama: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    block, _ = encode(llama, IDS, SMALL, place=Place("disk", tmp_path, "book"), notify=said.append)
    damage(tmp_path / "book-24.rows", "changed")
    read, started = RowFile.read, [threading.Event() for _ in range(3)]

    def watched(self: RowFile, start: int, stop: int) -> torch.Tensor:
        if stop - start == 2:
            started[start // 2].set()
        return read(self, start, stop)

    monkeypatch.setattr(RowFile, "read", watched)
    found = []
    for first, kv in block.batches(llama, 2):
        if first + 2 < 6:
            assert started[first // 2 + 1].wait(60)  # before this one is given back
        if first + 4 < 6:
            assert not started[first // 2 + 2].is_set()  # no more than one
        found.append(kv)
    assert difference([concat(found, 0)], rows_of(llama, encode(llama, IDS, SMALL))[:1]) == 0
    assert len(said) == 1
    assert [first for first, _ in block.batches(llama, 4)] == [0, 4]
    assert next(iter(block.batches(llama, 2)))[0] == 0  # one that is left early does not hang


def failing(number: int) -> Callable[..., int]:
    """What a call of the system does on a disk that fails with an error."""

    def call(*_: Any) -> int:
        raise OSError(number, os.strerror(number))

    return call


def test_rows_of_a_failing_disk_are_read_again_though_they_cannot_be_mended(
    llama: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    block, _ = encode(llama, IDS, SMALL, place=Place("disk", tmp_path, "book"), notify=said.append)
    monkeypatch.setattr(os, "preadv", failing(errno.EIO))
    monkeypatch.setattr(os, "pwrite", failing(errno.EROFS))
    expected = encode(llama, IDS, SMALL)[0]
    assert difference([block.rows(llama, 1, 2)], [expected.rows(llama, 1, 2)]) == 0
    assert "Input/output error" in said[0]
    assert "Read-only file system" in said[1]
    assert not block.kv.has(0, IDS[:24])


def test_a_damaged_file_is_found_when_it_is_opened_again(llama: nn.Module, tmp_path: Path) -> None:
    place, said = Place("disk", tmp_path, "book"), []
    encode(llama, IDS, SMALL, place=place)
    (tmp_path / "book-24.rows").write_bytes(b"not rows")
    damage(tmp_path / "book-7.rows", "changed")
    blocks = encode(llama, IDS, SMALL, place=place, notify=said.append)
    assert difference(rows_of(llama, blocks), rows_of(llama, encode(llama, IDS, SMALL))) == 0
    assert said[0].endswith("book-24.rows was of something else; the text is read again.")
    assert len(said) == 2  # a changed record shows when it is read


def test_a_file_of_another_text_is_found_out(llama: nn.Module, tmp_path: Path) -> None:
    said: list[str] = []
    blocks = encode(llama, IDS, SMALL, place=Place("disk", tmp_path, "book"), notify=said.append)
    encode(llama, [*IDS[:24], *random_ids(len(IDS) - 24, seed=9)], SMALL, place=Place("disk", tmp_path, "other"))
    (tmp_path / "book-24.rows").write_bytes((tmp_path / "other-24.rows").read_bytes())
    assert difference(rows_of(llama, blocks), rows_of(llama, encode(llama, IDS, SMALL))) == 0
    assert len(said) == 5  # the first chunk is the same in both


def files_of(model: nn.Module, folder: Path, token_ids: list[int] = IDS) -> tuple[Place, list[KV]]:
    """A text that was kept: where, and its rows."""
    place = Place("disk", folder, document_key(model, token_ids, SMALL))
    return place, rows_of(model, encode(model, token_ids, SMALL, place=place))


def test_a_file_of_another_model_under_this_ones_name_is_not_used(llama: nn.Module, tmp_path: Path) -> None:
    place, expected = files_of(llama, tmp_path)
    other, theirs = files_of(changed_in_the_middle(), tmp_path)
    assert difference(theirs, expected) > 0
    for length in (24, 7):
        (tmp_path / f"{other.name}-{length}.rows").replace(tmp_path / f"{place.name}-{length}.rows")
    said: list[str] = []
    for _ in range(2):
        got = rows_of(llama, encode(llama, IDS, SMALL, place=place, notify=said.append))
        assert difference(got, expected) == 0
    assert said == [f"{tmp_path / place.name}-24.rows was of another model or text; the text is read again."]


def test_a_file_of_an_earlier_version_is_read_anew(llama: nn.Module, tmp_path: Path) -> None:
    place, expected = files_of(llama, tmp_path)
    for path in tmp_path.iterdir():
        content = path.read_bytes()
        header = {**json.loads(content[:4096]), "format": 1}
        del header["document"]
        path.write_bytes(json.dumps(header).encode().ljust(4096) + content[4096:])
        damage(path, "changed")
    said: list[str] = []
    for _ in range(2):
        assert difference(rows_of(llama, encode(llama, IDS, SMALL, place=place, notify=said.append)), expected) == 0
    assert said == [f"{tmp_path / place.name}-24.rows was of an earlier version; the text is read again."]


def test_texts_that_begin_otherwise_do_not_mix(llama: nn.Module, tmp_path: Path) -> None:
    kept = {first: files_of(llama, tmp_path, [first, *IDS])[1] for first in (5, 6)}
    assert len(list(tmp_path.iterdir())) == 4
    for first, rows in kept.items():
        assert difference(files_of(llama, tmp_path, [first, *IDS])[1], rows) == 0
    assert difference(kept[5][:1], kept[6][:1]) > 0


@pytest.fixture
def read_only(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, int], None]:
    """Make a folder one that cannot be written, as the superuser sees it too."""

    def make(folder: Path, number: int) -> None:
        opened = os.open

        def refusing(path: Any, flags: int, *rest: Any, **named: Any) -> int:
            if flags & (os.O_WRONLY | os.O_RDWR) and str(path).startswith(str(folder)):
                raise OSError(number, os.strerror(number), path)
            return opened(path, flags, *rest, **named)

        monkeypatch.setattr(os, "open", refusing)

    return make


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_what_is_kept_where_nothing_can_be_written_is_used(
    llama: nn.Module,
    tmp_path: Path,
    read_only: Callable[[Path, int], None],
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    place, expected = files_of(llama, tmp_path)
    read_only(tmp_path, number)
    with monkeypatch.context() as patched:
        patched.setattr(chunks, "read_behind", lambda *_: pytest.fail("it was read again"))
        blocks = encode(llama, IDS, SMALL, place=place)
        assert difference(rows_of(llama, blocks), expected) == 0
    damage(tmp_path / f"{place.name}-24.rows", "changed")
    said: list[str] = []
    assert difference(rows_of(llama, encode(llama, IDS, SMALL, place=place, notify=said.append)), expected) == 0
    assert "was damaged on disk" in said[0]
    assert f"({os.strerror(number)}); use another folder" in said[1]
    damage(tmp_path / f"{place.name}-24.rows", "emptied")
    with pytest.raises(DocumentError, match=rf"cannot be written .*\({os.strerror(number)}\); use another folder\.$"):
        encode(llama, IDS, SMALL, place=place)
    with pytest.raises(DocumentError, match=r"; use another folder\.$"):
        files_of(llama, tmp_path, IDS[:50])


def test_a_folder_in_the_place_of_a_file(llama: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "book-24.rows").mkdir()
    with pytest.raises(DocumentError, match=r"book-24\.rows \(Is a directory\); use another folder\.$"):
        encode(llama, IDS, SMALL, place=Place("disk", tmp_path, "book"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_forked_processes_use_a_file_at_once(tmp_path: Path) -> None:
    packing = Packing(((2, 16), (2, 16)), (torch.device("cpu"),), torch.float32, "same")
    file = RowFile(packing, 40, 8, tmp_path / "book.rows", tmp_path)
    tokens, (keys, values) = torch.arange(320).view(40, 8), torch.randn(2, 40, 2, 8, 16)
    file.write(0, KV([keys], [values]), tokens)

    def work(number: int) -> int:
        wrong = 0
        for i in random_ids(700, seed=number, vocab=40):
            if number == 0 and i % 4 == 0:  # one mends while others read
                file.write(i, KV([keys[i : i + 1]], [values[i : i + 1]]), tokens[i : i + 1])
            try:
                wrong += not torch.equal(file.rows(i, i + 1).keys[0], keys[i : i + 1])
            except DamagedRow:
                wrong += 1
        return wrong

    children = []
    for number in range(3):
        child = os.fork()
        if child == 0:
            os._exit(min(work(number), 255))
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]


@pytest.mark.parametrize("mask", [0o077, 0o002])
def test_files_have_the_modes_that_the_user_wants(llama: nn.Module, tmp_path: Path, mask: int) -> None:
    def modes() -> set[int]:
        return {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "kept").iterdir()}

    before = os.umask(mask)
    try:
        place, _ = files_of(llama, tmp_path / "kept")
        assert modes() == {0o666 & ~mask}
        for path in (tmp_path / "kept").iterdir():
            path.write_bytes(b"replaced")
        encode(llama, IDS, SMALL, place=place)
    finally:
        os.umask(before)
    assert modes() == {0o666 & ~mask}
    assert stat.S_IMODE((tmp_path / "kept").stat().st_mode) == 0o777 & ~mask


def changed_in_the_middle() -> nn.Module:
    model = build()
    model.model.layers[1].mlp.up_proj.weight.add_(0.01)
    return model


def changed_in_one_number() -> nn.Module:
    model = build()
    model.model.embed_tokens.weight[200, 7] += 0.01
    return model


def test_names_tell_models_types_and_texts_apart() -> None:
    model = build()
    names = {
        document_key(model, IDS, SMALL),
        document_key(model, IDS[1:], SMALL),
        document_key(model, IDS, SMALL.replace(kv_dtype="int8")),
        document_key(model, IDS, SMALL.replace(chunk_length=25)),
        document_key(build(dtype=torch.bfloat16), IDS, SMALL),
        document_key(build("qwen3"), IDS, SMALL),
        document_key(build(rope_parameters={"rope_theta": 5e4, "rope_type": "default"}), IDS, SMALL),
        document_key(changed_in_the_middle(), IDS, SMALL),
        document_key(changed_in_one_number(), IDS, SMALL),
        document_key(build(rms_norm_eps=1e-4), IDS, SMALL),
    }
    assert len(names) == 10
    assert document_key(build(), IDS, SMALL.replace(chunk_overlap=1)) in names
    assert document_key(with_candidates(build()), IDS, SMALL) in names  # rows do not depend on the adapter


def test_a_full_disk_is_one_sentence_and_loses_nothing(
    llama: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place("disk", tmp_path, "book")
    written = RowFile.write

    def fill(self: RowFile, row: int, kv: KV, ids: torch.Tensor) -> None:
        if row == 4:
            os.pwrite = failing(errno.ENOSPC)
        written(self, row, kv, ids)

    with monkeypatch.context() as patched:
        patched.setattr(RowFile, "write", fill)
        patched.setattr(os, "pwrite", os.pwrite)  # back again, whatever is done meanwhile
        with pytest.raises(DocumentError, match=r"cannot be written to .*No space left.* [KM]iB are .*kv_dtype='int8'"):
            encode(llama, IDS, SMALL, place=place)
    file = RowFile(Packing.of(llama, "same"), 6, 24, tmp_path / "book-24.rows", tmp_path, "book")
    pieces = [IDS[first:stop] for first, stop in cut(len(IDS), SMALL)[:6]]
    assert [file.has(i, piece) for i, piece in enumerate(pieces)] == [True] * 4 + [False] * 2


def test_a_disk_too_small_is_refused_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("focusllm.memory.cost.free_disk", lambda _: 1000)
    model = build(max_position_embeddings=10_000)
    with pytest.raises(MemoryLimitError, match=r"on disk, but 1000 bytes are free in .*a text of at most"):
        check_read(model, SMALL.replace(kv_place="disk"), 100_000, tmp_path)


def test_what_is_written_needs_no_room(tiny_llm: FocusLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "The key is under the mat. " * 20
    tiny_llm.read(text, store=tmp_path)
    monkeypatch.setattr("focusllm.memory.cost.free_disk", lambda _: 10)
    tiny_llm.read(text, store=tmp_path)
    with pytest.raises(MemoryLimitError, match="on disk"):
        tiny_llm.read(text + "More.", store=tmp_path)


def test_documents_are_kept_in_a_folder(tiny_llm: FocusLLM, tmp_path: Path) -> None:
    text = "The key is under the mat. " * 20
    first = tiny_llm.read(text, store=tmp_path / "kept")
    expected = tiny_llm.ask(first, "Where?", max_new_tokens=8).text
    assert first.nbytes == 0
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").iterdir()}
    again = tiny_llm.read(text, store=tmp_path / "kept")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").iterdir()} == files
    assert tiny_llm.ask(again, "Where?", max_new_tokens=8).text == expected
    plain = tiny_llm.read(text)
    assert tiny_llm.ask(plain, "Where?", max_new_tokens=8).text == expected
    assert plain.nbytes > 0


def test_temporary_rows_leave_nothing(tiny_llm: FocusLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOCUSLLM_CACHE", str(tmp_path))
    tiny_llm.model.focus_config = tiny_llm.config.replace(kv_place="disk")
    document = tiny_llm.read("The key is under the mat. " * 20)
    assert document.nbytes == 0
    assert tiny_llm.ask(document, "Where?", max_new_tokens=4).num_generated_tokens
    assert not list((tmp_path / "rows").iterdir())
