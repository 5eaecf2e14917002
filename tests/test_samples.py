"""What a training reads: corpora, made-up tasks, questions from files, the samples made of them."""

from __future__ import annotations

import json
import os
import pickle
import re
import stat
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from conftest import byte_tokenizer
from focusllm import DocumentError, TrainConfig, train
from focusllm.errors import ConfigError
from focusllm.training.config import Source
from focusllm.training.corpus import Corpus, dataset_rows, load_corpus
from focusllm.training.sampling import Sampler
from focusllm.training.tasks import Questions, Task, fact, read_multihop, read_stories, table
from training import TEXT


def read(path: Path, folder: Path, **source: Any) -> Corpus:
    return load_corpus(Source(str(path), **source), byte_tokenizer(), folder)


def test_folders_keep_their_documents_apart(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.md").write_text("three")
    (tmp_path / "bad.txt").write_bytes(b"\x7fELF\x02\x01\x01\x00\x00\xff\xfe\x80\x00")
    corpus = read(tmp_path, tmp_path / "cache")
    tokenizer = byte_tokenizer()
    assert [tokenizer.decode(corpus.document(i)) for i in range(len(corpus))] == ["one two", "three"]


def test_a_source_is_tokenised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("one two")
    first = read(tmp_path / "a.txt", tmp_path / "cache")
    with monkeypatch.context() as patched:
        patched.setattr("focusllm.training.corpus._tokenise", None)
        assert np.array_equal(read(tmp_path / "a.txt", tmp_path / "cache").tokens, first.tokens)
    (tmp_path / "cache" / ".part-killed").mkdir()  # what SIGKILL leaves
    (tmp_path / "a.txt").write_text("changed!")
    assert len(read(tmp_path / "a.txt", tmp_path / "cache").tokens) == 8
    assert not (tmp_path / "cache" / ".part-killed").exists()


def test_what_was_tokenised_is_known_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by its name, size and time, which archives and `cp -p` give to other text as well."""
    found = {}
    for folder, text in (("one", "one two"), ("other", "two one"), ("copy", "one two")):
        (tmp_path / folder / "data").mkdir(parents=True)
        for path in (tmp_path / folder / "a.txt", tmp_path / folder / "data" / "a.txt"):
            path.write_text(text)
            os.utime(path, (1, 1))
        monkeypatch.chdir(tmp_path / folder)
        if folder == "copy":
            monkeypatch.setattr("focusllm.training.corpus._tokenise", None)
        for path in (Path("a.txt"), Path("data")):
            corpus = read(path, tmp_path / "cache")
            assert byte_tokenizer().decode(corpus.document(0)) == text
            assert corpus.name == str(path)
            found[folder, path] = corpus.digest
    assert len(set(found.values())) == 2


def test_text_that_changes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def changing(path: Path) -> str:
        text = path.read_text()
        path.write_text("something else")
        return text

    (tmp_path / "a.txt").write_text("one two")
    monkeypatch.setattr("focusllm.training.corpus.read_text", changing)
    with pytest.raises(DocumentError, match="has changed while it was read"):
        read(tmp_path / "a.txt", tmp_path / "cache")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_marks(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two é"}\n', encoding=encoding)
    corpus, tokenizer = read(tmp_path / "a.jsonl", tmp_path / "cache"), byte_tokenizer()
    assert [tokenizer.decode(corpus.document(i)) for i in range(2)] == ["one", "two é"]
    (tmp_path / "qa1.txt").write_text("1 Mary went home.\n2 Where is Mary?\thome\t1\n", encoding=encoding)
    assert read_stories([tmp_path / "qa1.txt"])[0].inserts == ["Mary went home."]
    questions = [{"supporting_facts": [], "context": [], "question": "Who?", "answer": "Me"}]
    (tmp_path / "hotpot.json").write_text(json.dumps(questions), encoding=encoding)
    assert read_multihop([tmp_path / "hotpot.json"])[0].answer == "Me"


def test_json_that_is_nested_too_deeply(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for number in (5000, 100_000):
        path.write_text(f'{{"text": {"[" * number}{"]" * number}}}')
        with pytest.raises(DocumentError, match=r"line 1 is not JSON \(it is nested too deeply\)"):
            read(path, tmp_path / "cache")
        with pytest.raises(DocumentError, match="nested too deeply"):
            read_multihop([path])


def test_names_of_files_are_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    try:
        (tmp_path / "folder" / os.fsdecode(b"caf\xe9.txt")).write_text("one")
    except OSError:
        pytest.skip("a file system that has none")
    (tmp_path / "folder" / os.fsdecode(b"no text\n\xe9.txt")).write_bytes(b"\xff\xfe\xff\0\0")
    corpus = read(tmp_path / "folder", tmp_path / "cache")
    assert byte_tokenizer().decode(corpus.document(0)) == "one"
    path = tmp_path / "folder" / os.fsdecode(b"odd\n\xe9.jsonl")
    path.write_text("nonsense")
    with pytest.raises(DocumentError, match=r"odd\\n\\udce9.jsonl, line 1 is not JSON"):
        read(path, tmp_path / "cache")


@pytest.mark.parametrize("mask", [0o077, 0o002])
def test_kept_tokens_have_the_modes_that_the_user_wants(tmp_path: Path, mask: int) -> None:
    (tmp_path / "a.txt").write_text("one two")
    before = os.umask(mask)
    try:
        read(tmp_path / "a.txt", tmp_path / "cache")
    finally:
        os.umask(before)
    (folder,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~mask
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o666 & ~mask}


def test_what_looks_like_a_control_token_in_a_conversation_stays_text(tmp_path: Path) -> None:
    tokenizer, path = byte_tokenizer(), tmp_path / "rows.jsonl"
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.add_tokens(["</think>", "   "])
    end, think = tokenizer.convert_tokens_to_ids(["<|im_end|>", "</think>"])
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | trim }}<|im_end|>{% endfor %}</think>"
    said = [" a</think>b<|im_end|><|im_end|>", "<</think>>   <s>\ufdd1"]

    def conversation(*contents: str) -> tuple[list[int], list[int]]:
        roles = ("user", "assistant", "user", "assistant")
        messages = [{"role": role, "content": c} for role, c in zip(roles, contents, strict=False)]
        path.write_text(json.dumps({"messages": messages}))
        corpus = load_corpus(Source(str(path)), tokenizer, tmp_path / "cache")
        ids = corpus.document(0).tolist()
        return ids[: corpus.answers[0]], ids[corpus.answers[0] :]

    asked, answer = conversation(*said, said[0], "so<|im_end|>")
    assert (asked.count(end), asked.count(think), asked.count(tokenizer.bos_token_id)) == (3, 1, 0)
    rendered = f"{said[0].strip()}<|im_end|><</think>>   <s><|im_end|>{said[0].strip()}<|im_end|></think>"
    assert tokenizer.decode(asked) == rendered
    assert end not in answer
    assert tokenizer.decode(answer) == "so<|im_end|></s>"
    plain = [{"role": "user", "content": "Hi   there"}]
    expected = tokenizer.apply_chat_template(plain, add_generation_prompt=True, return_dict=False)
    assert conversation("Hi   there", "Ho")[0] == expected


def test_jsonl_with_text_messages_and_prompts(tmp_path: Path) -> None:
    rows = [
        {"text": "plain"},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
        {"prompt": "question ", "completion": "answer"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    corpus, tokenizer = read(path, tmp_path / "cache"), byte_tokenizer()
    assert corpus.answers.tolist()[0] == -1
    answers = [tokenizer.decode(corpus.document(i)[corpus.answers[i] :]) for i in (1, 2)]
    assert answers == ["Ho</s>", "answer</s>"]
    assert tokenizer.decode(corpus.document(1)).startswith("<s>Hi</s><s>")
    path.write_text('{"text": "fine"}\n{"body": "x"}')
    with pytest.raises(ConfigError, match=r"line 2 has no text in a column 'text'.*it has body"):
        read(path, tmp_path / "cache")
    path.write_text("nonsense")
    with pytest.raises(DocumentError, match="line 1 is not JSON"):
        read(path, tmp_path / "cache")


def test_rows_with_halves_of_characters_or_no_text(tmp_path: Path) -> None:
    path, tokenizer = tmp_path / "rows.jsonl", byte_tokenizer()
    chat = r'{"messages": [{"role": "user", "content": "a\ud83d"}, {"role": "assistant", "content": "b\udc00"}]}'
    path.write_text("\n".join([r'{"text": "cut \ud83d off"}', r'{"text": "\ud83d\ude00"}', '{"text": null}', chat]))
    corpus = read(path, tmp_path / "cache")
    found = [tokenizer.decode(corpus.document(i)) for i in range(len(corpus))]
    assert found[:2] == ["cut \ufffd off", "\U0001f600"]
    assert "a\ufffd" in found[2]
    assert found[2].endswith("b\ufffd</s>")
    assert len(found) == 3


def test_another_chat_template_is_tokenised_anew(tmp_path: Path) -> None:
    path, tokenizer = tmp_path / "rows.jsonl", byte_tokenizer()
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    path.write_text(json.dumps({"messages": messages}))
    first = load_corpus(Source(str(path)), tokenizer, tmp_path / "cache").document(0).tolist()
    tokenizer.chat_template = "{{ messages[0].content }}?"
    assert load_corpus(Source(str(path)), tokenizer, tmp_path / "cache").document(0).tolist() != first


def test_a_corpus_goes_to_another_process_by_its_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two " * 10_000)
    corpus = read(tmp_path / "a.txt", tmp_path / "cache")
    sent = pickle.dumps(corpus)
    assert len(sent) < 2000 < corpus.tokens.nbytes
    assert np.array_equal(pickle.loads(sent).document(0), corpus.document(0))


def test_text_that_is_held_out_is_not_trained_on(train_settings: Callable[..., TrainConfig], tmp_path: Path) -> None:
    (tmp_path / "all" / "part").mkdir(parents=True)
    whole, part = str(tmp_path / "all"), str(tmp_path / "all" / "part")
    for sources in ([whole, part], [part, whole]):
        with pytest.raises(ConfigError, match="have text in common"):
            train(train_settings(sources=sources), tmp_path / "out")
    for kept in (part, {"path": part, "split": "test"}):  # folders have no splits
        with pytest.raises(ConfigError, match=r"is held out, but .* has it too; keep them apart"):
            train(train_settings(sources=[whole], held_out=[kept]), tmp_path / "out")
    with pytest.raises(ConfigError, match="lies in the source"):
        train(train_settings(sources=[whole]), tmp_path / "all" / "out")


@pytest.mark.parametrize("count", [2, 49, 50, 120])
def test_no_question_is_trained_on_and_held_out(count: int) -> None:
    tasks = [Task([], str(i), "", "") for i in range(count)]
    train_part, held_out = Questions(tasks, "train").tasks, Questions(tasks, "held out").tasks
    assert len(held_out) == max(1, count // 50)
    assert sorted(int(task.question) for task in (*train_part, *held_out)) == list(range(count))


def test_hugging_face_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"body": "alpha"}\n{"body": "beta"}')
    source = f"hf:{tmp_path / 'data'}"
    corpus = load_corpus(Source(source, column="body"), byte_tokenizer(), tmp_path / "cache")
    assert [byte_tokenizer().decode(corpus.document(i)) for i in range(2)] == ["alpha", "beta"]
    with pytest.raises(ConfigError, match="has no text in a column 'text'"):
        load_corpus(Source(source), byte_tokenizer(), tmp_path / "cache")

    (tmp_path / "data" / "train.jsonl").write_text('{"body": "gamma"}\n{"body": "delta"}')
    corpus = load_corpus(Source(source, column="body"), byte_tokenizer(), tmp_path / "cache")
    assert byte_tokenizer().decode(corpus.document(0)) == "gamma"

    asked: list[dict[str, Any]] = []
    monkeypatch.setattr("datasets.load_dataset", lambda **selection: asked.append(selection) or iter([{"text": "x"}]))
    assert list(dataset_rows(Source("hf:owner/name/part/file.jsonl.gz"))) == [{"text": "x"}]
    list(dataset_rows(Source("hf:owner/name/data.zip/part/file.jsonl")))
    list(dataset_rows(Source("hf:owner/name/data.zip/part/file.jsonl"), "c0ffee"))
    list(dataset_rows(Source("hf:owner/name"), "c0ffee"))
    assert [selection.get("data_files") for selection in asked] == [
        "hf://datasets/owner/name/part/file.jsonl.gz",
        "zip://part/file.jsonl::hf://datasets/owner/name/data.zip",
        "zip://part/file.jsonl::hf://datasets/owner/name@c0ffee/data.zip",
        None,
    ]
    assert asked[0] | {"data_files": ""} == {"path": "json", "data_files": "", "split": "train", "streaming": True}
    assert (asked[3]["path"], asked[3]["revision"]) == ("owner/name", "c0ffee")


def test_datasets_of_the_hub_are_kept_by_their_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub: dict[str, str] = {"owner/name": "alpha"}

    def info(_: Any, repository: str) -> Any:
        if repository not in hub:
            raise ConnectionError("no route")
        return SimpleNamespace(sha=f"revision of {hub[repository]}")

    def load(path: str, revision: str, **_: Any) -> list[dict[str, str]]:
        assert revision == f"revision of {hub[path]}"
        return [{"text": hub[path]}]

    def text(name: str, **source: Any) -> str:
        corpus = load_corpus(Source(f"hf:{name}", **source), byte_tokenizer(), tmp_path / "cache")
        found: str = byte_tokenizer().decode(corpus.document(0))
        return found

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", info)
    monkeypatch.setattr("datasets.load_dataset", load)
    assert text("owner/name") == "alpha"
    hub["owner/name"] = "beta"
    assert text("owner/name") == "beta"
    hub["owner/other"] = "beta"  # the same revision means nothing elsewhere
    assert text("owner/other") == "beta"
    assert len(list((tmp_path / "cache").glob("*/source.json"))) == 3
    hub.clear()  # out of reach
    assert text("owner/name") == "beta"
    with pytest.raises(DocumentError, match=r"the dataset owner/name cannot be read \(no route\)"):
        text("owner/name", split="test")
    hub["nobody/nothing"] = "gamma"

    def unreachable(**_: Any) -> None:
        raise ConnectionError("no such host")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(DocumentError, match=r"the dataset nobody/nothing cannot be read \(no such host\)"):
        text("nobody/nothing")


def test_empty_and_short_sources(train_settings: Callable[..., TrainConfig], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DocumentError, match="empty has no text"):
        train(train_settings(sources=[str(tmp_path / "empty")]), tmp_path / "out")
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(DocumentError, match="has 8 tokens, but a sample takes at least 56"):
        train(train_settings(sources=[str(tmp_path / "short.txt")]), tmp_path / "out")


def test_held_out_text_is_not_trained_on() -> None:
    tokens = np.arange(1000)
    many = Corpus("many", tokens, np.arange(0, 1000, 10), np.arange(10, 1001, 10), np.full(100, -1))
    trained, held_out = many.split()
    assert (len(trained), len(held_out)) == (98, 2)
    assert not set(trained.starts) & set(held_out.starts)
    one = Corpus("one", tokens, np.array([0]), np.array([1000]), np.array([-1]))
    trained, held_out = one.split()
    assert (trained.ends[0], held_out.starts[0], held_out.ends[0]) == (980, 980, 1000)


@pytest.fixture
def sampler(train_settings: Callable[..., TrainConfig], tmp_path: Path) -> Sampler:
    story = "1 Mary went to the garden.\n2 John took the milk.\n3 Where is Mary? \tgarden\t1\n"
    (tmp_path / "babi.txt").write_text(story)
    paragraphs = {"context": [["A", ["x."]], ["B", ["y."]]], "supporting_facts": [["A", 0]]}
    (tmp_path / "hops.json").write_text(json.dumps([{"question": "Who?", "answer": "Ann", **paragraphs}]))
    config = train_settings(
        objectives={"repetition": 1, "continuation": 1, "facts": 1, "tables": 1, "stories": 1, "multihop": 1},
        stories=[str(tmp_path / "babi.txt")],
        multihop=[str(tmp_path / "hops.json")],
        chunk_lengths=[512, 1024],
        memory_lengths=[2048],
        samples_per_memory=6,
    )
    (tmp_path / "text.txt").write_text(TEXT)
    return Sampler(config, byte_tokenizer(), [(read(tmp_path / "text.txt", tmp_path / "cache"), 1.0)])


def test_samples_are_what_their_objectives_say(sampler: Sampler) -> None:
    decode = byte_tokenizer().decode
    seen = set()
    for number in range(25):
        memory = sampler.draw(0, number)
        assert memory.chunks.shape[0] * memory.chunks.shape[1] == 2048
        far = decode(memory.chunks.flatten())
        for sample in memory.samples:
            text, answer = decode(sample.token_ids), decode(sample.token_ids[-sample.num_answers :])
            value = answer.removesuffix("</s>").strip()
            seen.add(sample.objective)
            if sample.objective == "repetition":
                assert text in far
            elif sample.objective == "continuation":
                assert text in TEXT
            elif sample.objective in ("facts", "tables"):
                assert value.removesuffix(".").split(" is ")[-1] in far
            elif sample.objective == "stories":
                assert value == "garden"
                assert far.index("Mary went to the garden") < far.index("John took the milk")
            else:
                assert value == "Ann"
                assert "A\nx." in far
            assert sample.prompt_length >= 1
    assert seen == {"repetition", "continuation", "facts", "tables", "stories", "multihop"}


def test_distractors_stand_around_the_documents_own_chunks(sampler: Sampler, tmp_path: Path) -> None:
    sampler.config = sampler.config.replace(
        distractors=[0, 2, 5], distractor_pool=6, refresh_rows=3, chunk_lengths=[256]
    )
    (tmp_path / "others").mkdir()
    for name in ("Queequeg", "Starbuck", "Stubb"):
        (tmp_path / "others" / f"{name}.txt").write_text(TEXT.replace("Ishmael", name))
    sampler.corpora += [(read(tmp_path / "others", tmp_path / "cache"), 2.0)]
    decode = byte_tokenizer().decode
    names = ("Ishmael", "Queequeg", "Starbuck", "Stubb")
    counts, places, repeated, different = set(), set(), set(), set()
    for number in range(60):
        memory = sampler.draw(0, number)
        own, rows = memory.own, len(memory.chunks)
        others = [*range(own.start), *range(own.stop, rows)]
        assert own.stop - own.start == 8
        (subject,) = (name for name in names if f"me {name}" in decode(memory.chunks[own].flatten()))
        assert not any(subject in decode(memory.chunks[row]) for row in others)
        counts.add(len(others))
        places.add((len(others), own.start))
        different |= {memory.chunks[row].tobytes() for row in others}
        for sample in memory.samples:
            assert len(sample.refreshed) == len(set(sample.refreshed)) >= 3
            read_rows = decode(memory.chunks[sorted(sample.refreshed)].flatten())
            value = decode(sample.answers).removesuffix("</s>").strip()
            if sample.objective in ("facts", "tables"):
                assert value.removesuffix(".").split(" is ")[-1] in read_rows
            elif sample.objective == "repetition":
                assert decode(sample.token_ids) in read_rows
                repeated.add(sample.refreshed[0] in others)
            elif sample.objective == "continuation":
                assert own.stop - 1 in sample.refreshed
    assert {0, 2, 5} <= counts <= set(range(6))  # fewer where some are of the memory's own document
    assert len({start for count, start in places if count >= 3}) > 3
    assert repeated == {True, False}
    assert 3 < len(different) <= 6


def test_a_document_alone_has_no_distractors(sampler: Sampler) -> None:
    sampler.config = sampler.config.replace(distractors=[5])
    assert {len(sampler.draw(0, number).chunks) for number in range(5)} <= {2, 4}


def test_a_question_without_facts_is_a_sample_too(sampler: Sampler) -> None:
    sampler.config = sampler.config.replace(objectives={"stories": 1, "facts": 1}, refresh_rows=2)
    sampler.tasks["stories"] = lambda _: Task([], "Who?", "", "nobody")
    memory = sampler.draw(0, 0)
    decode = byte_tokenizer().decode
    for sample in memory.samples:
        value = decode(sample.answers).removesuffix("</s>").strip().removesuffix(".").split(" is ")[-1]
        assert sample.objective == "stories" or value in decode(memory.chunks[sorted(sample.refreshed)].flatten())
    assert {sample.objective for sample in memory.samples} == {"stories", "facts"}


def test_noise_is_read_but_never_a_label(sampler: Sampler) -> None:
    sampler.config = sampler.config.replace(objectives={"repetition": 1}, noise=0.25, local_lengths=[64])
    decode = byte_tokenizer().decode
    memory = sampler.draw(0, 0)
    far = decode(memory.chunks.flatten())
    changed = 0
    for sample in memory.samples:
        answer = decode(sample.answers)
        assert len(answer) == sample.num_answers
        assert answer in far
        read = decode(sample.token_ids[-sample.num_answers :])
        changed += sum(a != b for a, b in zip(read, answer, strict=True))
    total = sum(sample.num_answers for sample in memory.samples)
    assert 0 < changed < total / 2
    sampler.part = "held out"
    assert all(decode(s.token_ids) in decode(m.chunks.flatten()) for m in [sampler.draw(0, 0)] for s in m.samples)


def test_facts_may_stand_in_the_local_context(sampler: Sampler) -> None:
    """There, or in the memory; such a local context is never longer than the longest one."""
    sampler.config = sampler.config.replace(objectives={"facts": 1}, local_lengths=[16, 700], local_facts=0.5)
    decode = byte_tokenizer().decode
    places = []
    for number in range(20):
        memory = sampler.draw(0, number)
        far = decode(memory.chunks.flatten())
        for sample in memory.samples:
            if sample.objective != "facts":
                continue
            local, answer = (decode(x) for x in (sample.token_ids[: -sample.num_answers], sample.answers))
            value = answer.removesuffix("</s>").strip().removesuffix(".").split(" is ")[-1]
            places.append(("far" if value in far else "") + ("local" if value in local else ""))
            assert len(sample.token_ids) - sample.num_answers <= 700
    assert places.count("far") > 15
    assert places.count("local") > 15
    assert all(places)
    assert places.count("farlocal") <= 9  # a short number is in the text by chance


def test_samples_depend_on_seed_step_and_number_only(sampler: Sampler) -> None:
    def ids(step: int, number: int, part: str = "train") -> list[int]:
        sampler.part = part
        memory = sampler.draw(step, number)
        return [*memory.chunks.flatten().tolist(), *(token for s in memory.samples for token in s.token_ids)]

    assert ids(3, 1) == ids(3, 1)
    assert len({tuple(x) for x in (ids(3, 1), ids(3, 2), ids(4, 1), ids(3, 1, "held out"))}) == 4


def test_answers_of_a_prompt_are_supervised_and_nothing_is_lost(
    train_settings: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": TEXT[:301], "completion": "the answer"}))
    corpus = read(tmp_path / "rows.jsonl", tmp_path / "cache")
    memory = Sampler(train_settings(answer_length=16, memory_lengths=[320]), byte_tokenizer(), [(corpus, 1.0)]).draw(
        0, 0
    )
    (sample,) = memory.samples
    decode = byte_tokenizer().decode
    assert decode(memory.chunks.flatten()) + decode(sample.token_ids) == f"{TEXT[:301]}the answer</s>"
    assert decode(sample.token_ids[-sample.num_answers :]) == "the answer</s>"
    assert memory.chunks.shape[1] <= 64


def test_made_up_tasks_have_their_answer_in_them() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        task = fact(rng)
        assert task.answer in task.inserts[0]
        task = table(rng)
        assert task.answer in task.inserts[0]
        assert task.lead in task.inserts[0]
    words = " ".join(fact(rng).inserts[0] + fact(rng).question for _ in range(500)).lower()
    assert "pass key" not in words  # the evaluation's own wording
    assert "passkey" not in words
    assert not re.search(r"\bkeeps?\b", words)  # nor that of the questions about places


def test_stories_are_read_from_babi(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(
        "1 A is here.\n2 Where is A? \there\t1\n3 B left.\n4 Where is B? |away,far|3\n1 New.\n2 Q? \tx\t1\n"
    )
    assert [(len(q.inserts), q.answer) for q in read_stories([path])] == [(1, "here"), (2, "away, far"), (1, "x")]
    path.write_text("no number\n")
    with pytest.raises(DocumentError, match="line 1 does not begin with a number"):
        read_stories([path])
    path.write_text("1 Only a fact.\n")
    with pytest.raises(DocumentError, match=r"a\.txt has no questions"):
        read_stories([path])
    with pytest.raises(DocumentError, match="cannot be read"):
        read_stories([tmp_path / "none.txt"])


def test_multihop_in_both_formats(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    paragraphs = [{"title": str(i), "paragraph_text": "x.", "is_supporting": i < 2} for i in range(9)]
    path.write_text(json.dumps({"paragraphs": paragraphs, "question": "Who?", "answer": "Ann"}) + "\n")
    (task,) = read_multihop([path])
    assert (len(task.inserts), task.answer, task.inserts[0]) == (6, "Ann", "0\nx.")
    row = json.dumps({"paragraphs": paragraphs, "question": "Who\u2028is?", "answer": "Ann"}, ensure_ascii=False)
    path.write_text(f"{row}\n\n{row}\n", encoding="utf-8")
    assert [task.question for task in read_multihop([path])] == ["Who\u2028is?"] * 2
    path.write_text("[]")
    with pytest.raises(DocumentError, match=r"a\.json has no questions"):
        read_multihop([path])
    path.write_text('[{"question": 1}]')
    with pytest.raises(DocumentError, match="is not in HotpotQA's or MuSiQue's format"):
        read_multihop([path])
