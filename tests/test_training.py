"""Training on tiny models: samples, corpora, the loop, checkpoints that survive SIGKILL, several processes."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from conftest import build, byte_tokenizer, random_ids, with_candidates
from focusllm import AdapterConfig, DocumentError, FocusLLM, TrainConfig, TrainingError, inject, train
from focusllm.adapter import trainable_parameters
from focusllm.errors import AdapterError, ConfigError
from focusllm.training import checkpoint
from focusllm.training.config import Source
from focusllm.training.corpus import Corpus, load_corpus
from focusllm.training.dense import Sample
from focusllm.training.loop import MemoryLoss, learning_rate
from focusllm.training.sampling import Memory, Sampler
from focusllm.training.tasks import Questions, fact, read_multihop, read_stories, table

TEXT = "".join(f"{i}. Call me Ishmael number {i * i}. Some years ago I went to sea.\n" for i in range(400))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny model without candidate projections, and a text."""
    folder = tmp_path_factory.mktemp("base")
    build(max_position_embeddings=512).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    rows = [{"prompt": TEXT[70 * i : 70 * i + 130], "completion": f"answer {i}"} for i in range(100)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def settings(base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., TrainConfig]:
    monkeypatch.setenv("FOCUSLLM_CACHE", str(tmp_path / "cache"))
    return lambda **changes: TrainConfig.from_dict({**tiny(base), **changes})


def tiny(base: Path) -> dict[str, Any]:
    return {
        "sources": [str(base / "text.txt")],
        "model": str(base / "model"),
        "rank": 4,
        "chunk_lengths": [32, 64],
        "memory_lengths": [128],
        "local_lengths": [16],
        "prompt_lengths": [8],
        "answer_length": 8,
        "samples_per_memory": 3,
        "memories_per_step": 4,
        "steps": 6,
        "warmup_steps": 2,
        "evaluate_every": 3,
        "evaluation_memories": 3,
        "save_every": 2,
        "objectives": {"repetition": 0.5, "continuation": 0.2, "facts": 0.3},
    }


def losses(output: Path) -> list[tuple[Any, ...]]:
    """What the log says, without times."""
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [(line["step"], *sorted((k, str(v)) for k, v in line.items() if k != "seconds")) for line in lines]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter" / "adapter_model.safetensors")


# --- a whole training -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft reads a renamed property
def test_a_training_leaves_an_adapter_that_everything_loads(
    settings: Callable[..., TrainConfig], base: Path, tmp_path: Path
) -> None:
    seen: list[dict[str, Any]] = []
    adapter = train(settings(steps=4, learning_rate=0.01), tmp_path / "out", report=seen.append)
    assert [entry["step"] for entry in seen if "loss" in entry] == [1, 2, 3, 4]
    evaluations = [entry for entry in seen if "evaluation" in entry]
    assert [entry["step"] for entry in evaluations] == [0, 3, 4]
    assert "without_memory" in evaluations[0]
    llm = FocusLLM.from_pretrained(base / "model", adapter=adapter, chunk_length=32, local_length=64)
    assert llm.has_trained_candidates
    assert llm.model.adapter_config.trained["steps"] in (3, 4)
    changed = [
        name for name, tensor in weights(tmp_path / "out").items() if "lora_B" in name and tensor.abs().max() > 0
    ]
    assert len(changed) == 3 * 4 - 2  # the last layer's q and o have no gradient
    card = (adapter / "README.md").read_text()
    assert "learning rate" in card
    assert "without memory" in card
    assert (tmp_path / "out" / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert list((tmp_path / "out" / "tensorboard").iterdir())
    from peft import PeftModel

    assert PeftModel.from_pretrained(build(max_position_embeddings=512), adapter) is not None


def test_training_lowers_the_loss(settings: Callable[..., TrainConfig], tmp_path: Path) -> None:
    config = settings(
        rank=0, projections="kv", steps=30, learning_rate=0.02, evaluate_every=30, objectives={"repetition": 1.0}
    )
    seen: list[dict[str, Any]] = []
    train(config, tmp_path / "out", report=seen.append)
    found = [entry["loss"] for entry in seen if "loss" in entry]
    assert np.mean(found[-5:]) < np.mean(found[:5]) - 0.1


def test_exact_supervision_has_one_label_a_sample(settings: Callable[..., TrainConfig], tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    train(settings(supervision="exact", steps=1), tmp_path / "out", report=seen.append)
    assert [entry["labels"] for entry in seen if "loss" in entry] == [12]


def test_checkpointed_passes_change_nothing(settings: Callable[..., TrainConfig], tmp_path: Path) -> None:
    for name, checkpointed in (("plain", False), ("less", True)):
        train(settings(steps=2, checkpointed=checkpointed), tmp_path / name)
    first, second = weights(tmp_path / "plain"), weights(tmp_path / "less")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_begins_from_an_adapter(settings: Callable[..., TrainConfig], tmp_path: Path) -> None:
    first = train(settings(steps=2, learning_rate=0.05), tmp_path / "first")
    seen: list[dict[str, Any]] = []
    train(settings(steps=1, init_adapter=str(first)), tmp_path / "second", report=seen.append)
    fresh: list[dict[str, Any]] = []
    train(settings(steps=1), tmp_path / "third", report=fresh.append)
    assert seen[0]["evaluation"]["loss"] != fresh[0]["evaluation"]["loss"]
    with pytest.raises(TrainingError, match="of rank 4, not qkvo of rank 8"):
        train(settings(steps=1, init_adapter=str(first), rank=8), tmp_path / "fourth")


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_learning_rate(schedule: str) -> None:
    config = TrainConfig(sources=(Source("x"),), schedule=schedule, steps=100, warmup_steps=10, learning_rate=1.0)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(1.0 if schedule == "constant" else 0.1, abs=0.02)


# --- stopping and going on --------------------------------------------------------------------------------------------

KILLED = """
import json, os, signal
import focusllm.{module} as place
from focusllm import TrainConfig, train
owner, name = place, {name!r}
original, calls = getattr(owner, name), 0
def dying(*arguments, **keywords):
    global calls
    calls += 1
    if calls == {call} and {before}:
        os.kill(os.getpid(), signal.SIGKILL)
    result = original(*arguments, **keywords)
    if calls == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
setattr(owner, name, dying)
train(TrainConfig.from_dict(json.loads({config!r})), {output!r})
"""
# Where the process dies: (module, function, which call, before it rather than behind it).
KILL_POINTS = {
    "in a step, nothing saved yet": ("training.loop", "dense_loss", 3, True),
    "between two checkpoints": ("training.loop", "dense_loss", 16, True),
    "with the adapter of a checkpoint written": ("training.loop", "save_adapter", 1, False),
    "before a written checkpoint is put in its place": ("files", "put_in_place", 2, True),
    "with the checkpoint of a new best in its place": ("files", "put_in_place", 2, False),
}


@pytest.fixture(scope="module")
def unbroken(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("unbroken") / "out"
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("FOCUSLLM_CACHE", str(output.parent / "cache"))
        train(TrainConfig.from_dict(tiny(base)), output)
    return output


@pytest.mark.parametrize("point", KILL_POINTS)
def test_killed_at_any_moment_it_goes_on_bit_for_bit(
    point: str, base: Path, unbroken: Path, settings: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    module, name, call, before = KILL_POINTS[point]
    output = tmp_path / "out"
    config = json.dumps(tiny(base))
    program = KILLED.format(module=module, name=name, call=call, before=before, config=config, output=str(output))
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == -signal.SIGKILL, result.stderr
    train(settings(), output)
    assert losses(output) == losses(unbroken)
    first, second = weights(output), weights(unbroken)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not list((output / "checkpoints").glob(".part-*"))


def test_ctrl_c_saves_and_goes_on(settings: Callable[..., TrainConfig], unbroken: Path, tmp_path: Path) -> None:
    def interrupt(entry: dict[str, Any]) -> None:
        if "loss" in entry and entry["step"] == 3:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(settings(), tmp_path / "out", report=interrupt)
    assert checkpoint.all_of(tmp_path / "out")[-1].name == "step-000003"
    notes: list[str] = []
    train(settings(), tmp_path / "out", notify=notes.append)
    assert notes == ["Going on after step 3 of 6."]
    assert losses(tmp_path / "out") == losses(unbroken)


def test_keeps_the_last_checkpoints_and_the_best(settings: Callable[..., TrainConfig], tmp_path: Path) -> None:
    train(settings(save_every=1, keep_last=2, evaluate_every=100), tmp_path / "out")
    names = [path.name for path in checkpoint.all_of(tmp_path / "out")]
    assert names == ["step-000005", "step-000006"]


# --- bad input --------------------------------------------------------------------------------------------------------


def test_other_settings_are_refused_on_resume(settings: Callable[..., TrainConfig], tmp_path: Path) -> None:
    train(settings(steps=2), tmp_path / "out")
    with pytest.raises(TrainingError, match=r"other settings \(learning_rate is 0.002, now 0.1\); use the same"):
        train(settings(steps=2, learning_rate=0.1), tmp_path / "out")
    assert weights(tmp_path / "out")
    train(settings(steps=2, save_every=7), tmp_path / "out")  # what has no influence may change


def test_a_checkpoint_of_another_model_is_refused(settings: Callable[..., TrainConfig], tmp_path: Path) -> None:
    train(settings(steps=2), tmp_path / "out")
    build(max_position_embeddings=512, num_hidden_layers=2).save_pretrained(tmp_path / "other")
    byte_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(AdapterError, match="belongs to another model"):
        train(settings(steps=2, model=str(tmp_path / "other")), tmp_path / "out")


def test_two_trainings_in_a_folder(settings: Callable[..., TrainConfig], tmp_path: Path) -> None:
    from filelock import FileLock

    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"), pytest.raises(TrainingError, match="another training is writing into"):
        train(settings(), tmp_path / "out")


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), RuntimeError("No space left on device"), SafetensorError("No space left")],
)
def test_a_full_disk_loses_nothing(
    error: Exception,
    settings: Callable[..., TrainConfig],
    tmp_path: Path,
    unbroken: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, calls = torch.save, []

    def full(*arguments: Any, **keywords: Any) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise error
        real(*arguments, **keywords)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(TrainingError, match=r"No space left.*was saved before is untouched"):
        train(settings(), tmp_path / "out")
    assert [path.name for path in checkpoint.all_of(tmp_path / "out")] == ["step-000002"]
    train(settings(), tmp_path / "out")
    assert losses(tmp_path / "out") == losses(unbroken)


def test_a_loss_that_is_not_finite_names_step_sample_and_checkpoint(
    settings: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    config = settings(learning_rate=1e30, save_every=1, steps=6, evaluate_every=6)
    with pytest.raises(
        TrainingError, match=r"the loss is nan in step \d .*text.txt.*last good checkpoint is .*step-0000"
    ):
        train(config, tmp_path / "out")


def test_a_damaged_checkpoint_is_named(settings: Callable[..., TrainConfig], tmp_path: Path) -> None:
    train(settings(steps=2), tmp_path / "out")
    (checkpoint.all_of(tmp_path / "out")[-1] / "optimizer.pt").write_bytes(b"junk")
    with pytest.raises(TrainingError, match="step-000002 is damaged"):
        train(settings(steps=2), tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"sources": []}, ConfigError, "there are no sources"),
        ({"sources": ["nowhere"]}, DocumentError, "there is no file or folder nowhere"),
        ({"chunk_lengths": [3000], "memory_lengths": [3000]}, ConfigError, "has 512; use smaller"),
        ({"memories_per_step": 0}, ConfigError, "memories_per_step is 0"),
        ({"objectives": {"magic": 1}}, ConfigError, "objectives has magic; known are continuation"),
        ({"objectives": {"stories": 1}}, ConfigError, "stories names no files"),
        ({"objectives": {"facts": 0}}, ConfigError, "not all 0"),
        ({"chunk_lengths": []}, ConfigError, "chunk_lengths is"),
        ({"chunk_lengths": [256]}, ConfigError, "memory_lengths only to 128"),
        ({"learning_rate": "fast"}, ConfigError, "learning_rate is 'fast'; it must be a number"),
        ({"sharded": "yes"}, ConfigError, "sharded is 'yes', which is of the wrong type"),
        ({"rank": "64"}, ConfigError, "rank is '64', which is of the wrong type"),
        ({"objectives": 0.5}, ConfigError, "objectives is 0.5, which is of the wrong type"),
        ({"local_lengths": "long"}, ConfigError, "local_lengths is"),
        ({"local_lengths": [510]}, ConfigError, "a local context behind its candidates takes up to 522 positions"),
        ({"schedule": "steep"}, ConfigError, "must be cosine"),
        ({"supervision": "some"}, ConfigError, "must be dense or exact"),
        ({"speed": 3}, ConfigError, "unknown setting speed"),
        ({"sources": [{"path": "x", "weight": 0}]}, ConfigError, "weight of x is 0"),
        ({"sources": [{"place": "x"}]}, ConfigError, "a source is wrong"),
    ],
)
def test_settings_that_cannot_work(
    changes: dict[str, Any], error: type[Exception], message: str, settings: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        train(settings(**changes), tmp_path / "out")


def test_settings_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(
        'steps = 7\nrank = 0\n[objectives]\nfacts = 1\n[[sources]]\npath = "x"\nweight = 2'
    )
    config = TrainConfig.from_file(tmp_path / "a.toml", seed=3)
    assert (config.steps, config.rank, config.seed, config.sources[0].weight) == (7, None, 3, 2)
    assert TrainConfig.from_dict(config.to_dict()) == config
    (tmp_path / "b.toml").write_text("steps = = 7")
    with pytest.raises(ConfigError, match="cannot be read"):
        TrainConfig.from_file(tmp_path / "b.toml")


# --- corpora and samples ----------------------------------------------------------------------------------------------


def read(path: Path, folder: Path, **source: Any) -> Corpus:
    return load_corpus(Source(str(path), **source), byte_tokenizer(), folder)


def test_folders_keep_their_documents_apart(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.md").write_text("three")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00binary\x00")
    corpus = read(tmp_path, tmp_path / "cache")
    tokenizer = byte_tokenizer()
    assert [tokenizer.decode(corpus.document(i)) for i in range(len(corpus))] == ["one two", "three"]


def test_a_source_is_tokenised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("one two")
    first = read(tmp_path / "a.txt", tmp_path / "cache")
    with monkeypatch.context() as patched:
        patched.setattr("focusllm.training.corpus._tokenise", None)
        assert np.array_equal(read(tmp_path / "a.txt", tmp_path / "cache").tokens, first.tokens)
    (tmp_path / "a.txt").write_text("changed!")
    assert len(read(tmp_path / "a.txt", tmp_path / "cache").tokens) == 8


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


def test_hugging_face_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"body": "alpha"}\n{"body": "beta"}')
    source = f"hf:{tmp_path / 'data'}"
    corpus = load_corpus(Source(source, column="body"), byte_tokenizer(), tmp_path / "cache")
    assert [byte_tokenizer().decode(corpus.document(i)) for i in range(2)] == ["alpha", "beta"]
    with pytest.raises(ConfigError, match="has no text in a column 'text'"):
        load_corpus(Source(source), byte_tokenizer(), tmp_path / "cache")

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("no such host")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(DocumentError, match=r"the dataset nobody/nothing cannot be read \(no such host\)"):
        load_corpus(Source("hf:nobody/nothing"), byte_tokenizer(), tmp_path / "cache")


def test_empty_and_short_sources(settings: Callable[..., TrainConfig], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DocumentError, match="empty has no text"):
        train(settings(sources=[str(tmp_path / "empty")]), tmp_path / "out")
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(DocumentError, match="has 8 tokens, but a sample takes at least 56"):
        train(settings(sources=[str(tmp_path / "short.txt")]), tmp_path / "out")


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
def sampler(settings: Callable[..., TrainConfig], tmp_path: Path) -> Sampler:
    story = "1 Mary went to the garden.\n2 John took the milk.\n3 Where is Mary? \tgarden\t1\n"
    (tmp_path / "babi.txt").write_text(story)
    paragraphs = {"context": [["A", ["x."]], ["B", ["y."]]], "supporting_facts": [["A", 0]]}
    (tmp_path / "hops.json").write_text(json.dumps([{"question": "Who?", "answer": "Ann", **paragraphs}]))
    config = settings(
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


def test_samples_depend_on_seed_step_and_number_only(sampler: Sampler) -> None:
    def ids(step: int, number: int, part: str = "train") -> list[int]:
        sampler.part = part
        memory = sampler.draw(step, number)
        return [*memory.chunks.flatten().tolist(), *(token for s in memory.samples for token in s.token_ids)]

    assert ids(3, 1) == ids(3, 1)
    assert len({tuple(x) for x in (ids(3, 1), ids(3, 2), ids(4, 1), ids(3, 1, "held out"))}) == 4


def test_answers_of_a_prompt_are_supervised_and_nothing_is_lost(
    settings: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": TEXT[:301], "completion": "the answer"}))
    corpus = read(tmp_path / "rows.jsonl", tmp_path / "cache")
    memory = Sampler(settings(answer_length=16, memory_lengths=[320]), byte_tokenizer(), [(corpus, 1.0)]).draw(0, 0)
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
    path.write_text('[{"question": 1}]')
    with pytest.raises(DocumentError, match="is not in HotpotQA's or MuSiQue's format"):
        read_multihop([path])


def test_questions_from_files_are_kept_from_training() -> None:
    tasks = [fact(np.random.default_rng(i)) for i in range(120)]
    trained, kept = Questions(tasks, "train").tasks, Questions(tasks, "held out").tasks
    assert (len(trained), len(kept), len(Questions(tasks).tasks)) == (118, 2, 120)
    assert not [task for task in kept if task in trained]


# --- several processes ------------------------------------------------------------------------------------------------


PROCESS = """
import json, signal, sys
from contextlib import suppress
from pathlib import Path
from torch.distributed.tensor import DTensor
from focusllm import TrainConfig, train
from focusllm.training import dense
from focusllm.training.loop import Training

def run(self, report, original=Training.run):
    held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in self.module.parameters())
    share = held / sum(p.numel() for p in self.module.parameters())
    print(f"{type(self.module).__name__} holds {share:.0%} from step {self.step}")
    return original(self, report)

def interrupt(entry):
    if "loss" in entry and entry["step"] == 3:
        signal.raise_signal(signal.SIGINT)

Training.run = run
dense.PACK_LABELS = int(sys.argv[3])
config = TrainConfig.from_dict(json.loads(Path(sys.argv[1]).read_text()))
with suppress(KeyboardInterrupt):
    train(config, sys.argv[2], report=interrupt)
train(config, sys.argv[2])
"""
FEW_LABELS = 8  # in a pack, and rows with one answer only: processes need unequal numbers of passes


def unequal(base: Path) -> dict[str, Any]:
    return {**tiny(base), "sources": [str(base / "text.txt"), str(base / "rows.jsonl")]}


WAYS = {
    "copies": ({}, "false", "DistributedDataParallel holds 100%"),
    "sharded by the settings": ({"sharded": True}, "false", "FSDPMemoryLoss holds 50%"),
    "sharded by the launch": ({"checkpointed": True}, "true", "FSDPMemoryLoss holds 50%"),
}


@pytest.fixture(scope="module")
def in_one_process(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("one") / "out"
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("FOCUSLLM_CACHE", str(output.parent / "cache"))
        patched.setattr("focusllm.training.dense.PACK_LABELS", FEW_LABELS)
        train(TrainConfig.from_dict(unequal(base)), output)
    return output


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_train_as_one(way: str, base: Path, in_one_process: Path, tmp_path: Path) -> None:
    """The same global batch shared out between two gloo processes, interrupted: the same losses, the same weights."""
    changes, launched_sharded, wrapped = WAYS[way]
    (tmp_path / "config.json").write_text(json.dumps({**unequal(base), **changes}))
    (tmp_path / "program.py").write_text(PROCESS)
    environment = {**os.environ, "FOCUSLLM_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    environment |= {"ACCELERATE_USE_FSDP": launched_sharded, "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(tmp_path / "program.py"), str(tmp_path / "config.json"), str(tmp_path / "out"), str(FEW_LABELS)]
    # Processes that do not run the same passes wait for each other for ever.
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    for step in (0, 3):
        assert result.stdout.count(f"{wrapped} from step {step}") == 2
    ours, expected = (
        [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        for folder in (tmp_path / "out", in_one_process)
    )
    assert [entry["step"] for entry in ours] == [entry["step"] for entry in expected]
    for one, other in zip(ours, expected, strict=True):
        for name in {"evaluation", "without_memory"} & other.keys() or {"loss"}:
            found, wanted = (one[name], other[name]) if name != "loss" else (one, other)
            assert found["loss"] == pytest.approx(wanted["loss"], abs=2e-5)
            assert found["labels"] == wanted["labels"]
        if "gradient_norm" in other:
            assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-4)
    first, second = weights(tmp_path / "out"), weights(in_one_process)
    assert {name: tensor.shape for name, tensor in first.items()} == {name: t.shape for name, t in second.items()}
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("way", ["dense", "checkpointed", "exact", "without memory"])
def test_agreed_passes_count_for_nothing_but_are_run(
    way: str, settings: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its samples are, a process that shares a model goes through it as often as is agreed."""
    monkeypatch.setattr("focusllm.training.dense.PACK_LABELS", 4)
    supervision = "exact" if way == "exact" else "dense"
    model = with_candidates(build())
    module = MemoryLoss(model, settings(supervision=supervision, checkpointed=way == "checkpointed"))
    for parameter in trainable_parameters(model).values():
        parameter.requires_grad_(way != "without memory")
    calls = {"forward": 0, "backward": 0}

    def count(what: str) -> None:
        calls[what] += 1

    model.model.layers[1].register_forward_hook(lambda *_: count("forward"))
    model.model.layers[1].register_full_backward_pre_hook(lambda *_: count("backward"))
    samples = [Sample(random_ids(20, 1), 5, 6), Sample(random_ids(2, 2), 1, 1), Sample(random_ids(30, 3), 1, 9)]
    found: dict[int, tuple[int, ...]] = {}
    for num_samples in (1, 2, 3):
        memory = Memory(np.array(random_ids(48)).reshape(3, 16), samples[-num_samples:], "here")
        natural = module.num_passes(memory.samples, way == "without memory")
        assert natural <= 3
        results = []
        for passes in (0, 3, 5):
            calls |= {"forward": 0, "backward": 0}
            losses, hits = module(memory, passes, way == "without memory")
            assert len(losses) == len(hits) == sum(module.sizes(memory.samples))
            if losses.requires_grad:
                losses.sum().backward()
                parts = [parameter.grad.flatten() for parameter in trainable_parameters(model).values()]
                model.zero_grad()
                results.append(torch.cat([losses.detach(), *parts]))
            else:
                results.append(losses)
            wanted = found.setdefault(max(passes, natural), tuple(calls.values()))
            assert tuple(calls.values()) == wanted
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], atol=1e-6, rtol=1e-4)
    assert len(set(found.values())) == len(found) > 1


def test_a_batch_that_cannot_be_shared_out(settings: Callable[..., TrainConfig], tmp_path: Path) -> None:
    from focusllm.training.loop import Training

    class Three:
        num_processes = 3

    model = build(max_position_embeddings=512)
    inject(model, AdapterConfig(rank=2))
    with pytest.raises(TrainingError, match="memories_per_step is 4, which cannot be shared out evenly among 3"):
        Training(settings(), model, None, None, tmp_path, accelerator=Three())


def test_in_another_thread(settings: Callable[..., TrainConfig], tmp_path: Path) -> None:
    """Where signals cannot be caught, training still works."""
    made: list[Path] = []
    thread = threading.Thread(target=lambda: made.append(train(settings(steps=1), tmp_path / "out")))
    thread.start()
    thread.join()
    assert made
