"""Training on tiny models: the loop, checkpoints that survive SIGKILL, what is refused."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import stat
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
from focusllm import DocumentError, FocusLLM, TrainConfig, TrainingError, train
from focusllm.errors import AdapterError, ConfigError
from focusllm.method.focus import encode_chunks
from focusllm.training import checkpoint
from focusllm.training.config import Source
from focusllm.training.loop import _interrupts, _signals_blocked, learning_rate
from focusllm.training.loss import MemoryLoss, Meter
from training import TEXT, losses, tiny, weights

# --- a whole training -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft reads a renamed property
def test_a_training_leaves_an_adapter_that_everything_loads(
    train_settings: Callable[..., TrainConfig], base: Path, tmp_path: Path
) -> None:
    seen: list[dict[str, Any]] = []
    adapter = train(train_settings(steps=4, learning_rate=0.01, sink=True), tmp_path / "out", report=seen.append)
    assert [entry["step"] for entry in seen if "loss" in entry] == [1, 2, 3, 4]
    evaluations = [entry for entry in seen if "evaluation" in entry]
    assert [entry["step"] for entry in evaluations] == [0, 3, 4]
    assert "without_memory" in evaluations[0]
    llm = FocusLLM.from_pretrained(base / "model", adapter=adapter, chunk_length=32, local_length=64)
    assert llm.has_trained_candidates
    assert llm.model.adapter_config.trained["steps"] in (3, 4)
    assert llm.model.adapter_config.sink_token == llm.tokenizer.bos_token_id
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


def test_training_lowers_the_loss(train_settings: Callable[..., TrainConfig], tmp_path: Path) -> None:
    config = train_settings(
        rank=0, projections="kv", steps=30, learning_rate=0.02, evaluate_every=30, objectives={"repetition": 1.0}
    )
    seen: list[dict[str, Any]] = []
    train(config, tmp_path / "out", report=seen.append)
    found = [entry["loss"] for entry in seen if "loss" in entry]
    assert np.mean(found[-5:]) < np.mean(found[:5]) - 0.1


def test_exact_supervision_has_one_label_a_sample(train_settings: Callable[..., TrainConfig], tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    train(train_settings(supervision="exact", steps=1), tmp_path / "out", report=seen.append)
    assert [entry["labels"] for entry in seen if "loss" in entry] == [12]


def test_checkpointed_passes_change_nothing(train_settings: Callable[..., TrainConfig], tmp_path: Path) -> None:
    for name, checkpointed in (("plain", False), ("less", True)):
        train(train_settings(steps=2, checkpointed=checkpointed), tmp_path / name)
    first, second = weights(tmp_path / "plain"), weights(tmp_path / "less")
    assert all(torch.equal(first[name], second[name]) for name in first)


def settings_of(adapter: Path) -> dict[str, Any]:
    return json.loads((adapter / "focus_config.json").read_text())  # type: ignore[no-any-return]


def test_begins_from_an_adapter(train_settings: Callable[..., TrainConfig], tmp_path: Path) -> None:
    first = train(train_settings(steps=2, learning_rate=0.05), tmp_path / "first")
    seen: list[dict[str, Any]] = []
    second = train(train_settings(steps=1, init_adapter=str(first), sink=True), tmp_path / "second", report=seen.append)
    fresh: list[dict[str, Any]] = []
    train(train_settings(steps=1, sink=True), tmp_path / "third", report=fresh.append)
    assert seen[0]["evaluation"]["loss"] != fresh[0]["evaluation"]["loss"]
    assert [settings["adapter"]["sink_token"] for settings in map(settings_of, (first, second))] == [None, 1]
    with pytest.raises(TrainingError, match="k, o, q, v of rank 4 and scale 1, not k, o, q, v of rank 8 and scale 1"):
        train(train_settings(steps=1, init_adapter=str(first), rank=8), tmp_path / "fourth")


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_learning_rate(schedule: str) -> None:
    config = TrainConfig(sources=(Source("x"),), schedule=schedule, steps=100, warmup_steps=10, learning_rate=1.0)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(1.0 if schedule == "constant" else 0.1, abs=0.02)


def test_in_another_thread(train_settings: Callable[..., TrainConfig], tmp_path: Path) -> None:
    """Where signals cannot be caught, training still works."""
    made: list[Path] = []
    thread = threading.Thread(target=lambda: made.append(train(train_settings(steps=1), tmp_path / "out")))
    thread.start()
    thread.join()
    assert made


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
    "in a step, nothing saved yet": ("training.loss", "dense_loss", 3, True),
    "between two checkpoints": ("training.loss", "dense_loss", 16, True),
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


KILLED_ALWAYS = ("between two checkpoints", "before a written checkpoint is put in its place")


@pytest.mark.parametrize(
    "point", [pytest.param(point, marks=[] if point in KILLED_ALWAYS else [pytest.mark.slow]) for point in KILL_POINTS]
)
def test_killed_at_any_moment_it_goes_on_bit_for_bit(
    point: str, base: Path, unbroken: Path, train_settings: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    module, name, call, before = KILL_POINTS[point]
    output = tmp_path / "out"
    config = json.dumps(tiny(base))
    program = KILLED.format(module=module, name=name, call=call, before=before, config=config, output=str(output))
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == -signal.SIGKILL, result.stderr
    train(train_settings(), output)
    assert losses(output) == losses(unbroken)
    first, second = weights(output), weights(unbroken)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not list((output / "checkpoints").glob(".part-*"))


def test_ctrl_c_saves_and_goes_on(train_settings: Callable[..., TrainConfig], unbroken: Path, tmp_path: Path) -> None:
    def interrupt(entry: dict[str, Any]) -> None:
        if "loss" in entry and entry["step"] == 3:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(train_settings(), tmp_path / "out", report=interrupt)
    assert checkpoint.all_of(tmp_path / "out")[-1].name == "step-000003"
    notes: list[str] = []
    train(train_settings(), tmp_path / "out", notify=notes.append)
    assert notes == ["Going on after step 3 of 6."]
    assert losses(tmp_path / "out") == losses(unbroken)


def test_with_distractors_it_goes_on_bit_for_bit_too(
    train_settings: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    for name in "abcd":
        (tmp_path / f"{name}.txt").write_text(TEXT.replace("Ishmael", name * 5))
    config = train_settings(
        sources=[str(tmp_path / f"{name}.txt") for name in "abcd"],
        refresh_rows=2, distractors=[0, 2, 4], distractor_pool=8, noise=0.2, chunk_lengths=[64],
    )  # fmt: skip

    def interrupt(entry: dict[str, Any]) -> None:
        if "loss" in entry and entry["step"] == 3:
            signal.raise_signal(signal.SIGINT)

    train(config, tmp_path / "unbroken")
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "out", report=interrupt)
    train(config, tmp_path / "out")
    assert losses(tmp_path / "out") == losses(tmp_path / "unbroken")
    first, second = weights(tmp_path / "out"), weights(tmp_path / "unbroken")
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_distractors_are_read_once_and_stand_where_they_should(train_settings: Callable[..., TrainConfig]) -> None:
    model = with_candidates(build())
    chunks = torch.tensor(random_ids(5 * 8)).view(5, 8)
    module = MemoryLoss(model, train_settings(chunk_lengths=[8], distractors=[3], distractor_pool=3))
    expected = encode_chunks(model, chunks)
    for own, known in ((slice(2, 4), 3), (slice(2, 4), 3), (slice(0, 5), 3), (slice(0, 1), 3)):
        found = module._encoded(chunks, own)
        for got, want in zip(found.keys + found.values, expected.keys + expected.values, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert len(module.distractors) == known  # of four, the one that was used last longest ago went


def test_keeps_the_last_checkpoints_and_the_best(train_settings: Callable[..., TrainConfig], tmp_path: Path) -> None:
    train(train_settings(save_every=1, keep_last=2, evaluate_every=100), tmp_path / "out")
    names = [path.name for path in checkpoint.all_of(tmp_path / "out")]
    assert names == ["step-000005", "step-000006"]


def test_the_best_checkpoint_is_kept_and_becomes_the_adapter(
    train_settings: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, measured, scripted = itertools.count(), Meter.result, (3.0, 1.0, 2.0, 4.0, 5.0, 6.0)

    def result(meter: Meter) -> dict[str, Any]:
        """Of the evaluation before the first step with memory and without, then of every step and its evaluation."""
        call = next(calls)
        return measured(meter) | ({"loss": scripted[(call - 3) // 2]} if call > 2 and call % 2 else {})

    monkeypatch.setattr(Meter, "result", result)
    train(train_settings(save_every=1, keep_last=1, evaluate_every=1), tmp_path / "out")
    names = [path.name for path in checkpoint.all_of(tmp_path / "out")]
    assert names == ["step-000002", "step-000005", "step-000006"]  # the newest may turn out to be damaged
    best = load_file(tmp_path / "out" / "checkpoints" / "step-000002" / "adapter_model.safetensors")
    assert all(torch.equal(tensor, best[name]) for name, tensor in weights(tmp_path / "out").items())


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="no signals to block")
def test_signals_wait_while_processes_start_and_do_not_reach_them() -> None:
    program = "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    with _interrupts() as interrupted:
        with _signals_blocked():
            child = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True)
            signal.raise_signal(signal.SIGINT)
            assert not interrupted.is_set()
        assert interrupted.wait(5)
    assert child.stdout == "True\n"


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000):
        (tmp_path / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
        (tmp_path / "checkpoints" / f"step-{step:06d}" / "state.json").write_text("{}")
    assert [path.name for path in checkpoint.all_of(tmp_path)] == ["step-999999", "step-1000000"]


# --- bad input --------------------------------------------------------------------------------------------------------


def test_other_settings_are_refused_on_resume(train_settings: Callable[..., TrainConfig], tmp_path: Path) -> None:
    train(train_settings(steps=2), tmp_path / "out")
    with pytest.raises(TrainingError, match=r"other settings \(learning_rate is 0.004, now 0.1\); use the same"):
        train(train_settings(steps=2, learning_rate=0.1), tmp_path / "out")
    assert weights(tmp_path / "out")
    train(train_settings(steps=2, save_every=7), tmp_path / "out")  # what has no influence may change


def test_what_else_the_numbers_depend_on_is_refused_on_resume(
    train_settings: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    stories = tmp_path / "qa1_train.txt"
    stories.write_text("1 Mary went home.\n2 Where is Mary?\thome\t1\n1 Tom sat.\n2 What did Tom do?\tsit\t1\n")
    given = {"steps": 2, "stories": [str(stories)], "objectives": {"stories": 1.0}, "refresh_rows": 1}
    train(train_settings(**given), tmp_path / "out")
    with pytest.raises(TrainingError, match=r"other settings \(labels_per_pass is 192, now 8\)"):
        train(train_settings(**given, labels_per_pass=8), tmp_path / "out")
    path = tmp_path / "out" / "checkpoints" / "step-000002" / "state.json"
    kept = json.loads(path.read_text())
    path.write_text(json.dumps({**kept, "dtype": "float16"}))  # where auto is another type
    checkpoint.write_sums(path.parent)
    with pytest.raises(TrainingError, match=r"another dtype \(float16, now (float32|bfloat16)\); set dtype to float16"):
        train(train_settings(**given), tmp_path / "out")
    path.write_text(json.dumps(kept))
    checkpoint.write_sums(path.parent)
    stories.write_text(stories.read_text().replace("sit", "sat"))
    with pytest.raises(TrainingError, match="with another content of stories and multihop"):
        train(train_settings(**given), tmp_path / "out")


@pytest.mark.parametrize(("memories", "best"), [(3, 4), (2, 6)])
def test_losses_of_other_memories_are_not_compared(
    train_settings: Callable[..., TrainConfig], tmp_path: Path, memories: int, best: int
) -> None:
    train(train_settings(), tmp_path / "out")
    assert read_adapter_steps(tmp_path / "out") == 6
    folder = tmp_path / "out" / "checkpoints"
    shutil.rmtree(folder / "step-000006")
    state = json.loads((folder / "step-000004" / "state.json").read_text())
    (folder / "step-000004" / "state.json").write_text(json.dumps({**state, "best": {"loss": -1.0, "step": 4}}))
    checkpoint.write_sums(folder / "step-000004")
    train(train_settings(evaluation_memories=memories), tmp_path / "out")
    assert read_adapter_steps(tmp_path / "out") == best


def read_adapter_steps(output: Path) -> int:
    steps: int = settings_of(output / "adapter")["adapter"]["trained"]["steps"]
    return steps


def test_a_training_from_before_a_setting_goes_on_without(
    train_settings: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    train(train_settings(steps=2), tmp_path / "out")
    for path in (tmp_path / "out" / "checkpoints").glob("*/state.json"):
        state = json.loads(path.read_text())
        for newer in ("sink", "noise", "refresh_rows", "distractors", "distractor_pool"):
            del state["config"][newer]
        del state["format"], state["content of the sources"]
        path.write_text(json.dumps(state))
        path.with_name("checksums.json").unlink()
    train(train_settings(steps=2), tmp_path / "out")
    with pytest.raises(TrainingError, match=r"other settings \(sink is False, now True\)"):
        train(train_settings(steps=2, sink=True), tmp_path / "out")


def test_a_checkpoint_of_another_model_is_refused(train_settings: Callable[..., TrainConfig], tmp_path: Path) -> None:
    train(train_settings(steps=2), tmp_path / "out")
    build(max_position_embeddings=512, num_hidden_layers=2).save_pretrained(tmp_path / "other")
    byte_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(AdapterError, match="belongs to another model"):
        train(train_settings(steps=2, model=str(tmp_path / "other")), tmp_path / "out")


def test_two_trainings_in_a_folder(train_settings: Callable[..., TrainConfig], tmp_path: Path) -> None:
    from filelock import FileLock

    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"), pytest.raises(TrainingError, match="another training is writing into"):
        train(train_settings(), tmp_path / "out")


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), RuntimeError("No space left on device"), SafetensorError("No space left")],
)
def test_a_full_disk_loses_nothing(
    error: Exception,
    train_settings: Callable[..., TrainConfig],
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
        train(train_settings(), tmp_path / "out")
    assert [path.name for path in checkpoint.all_of(tmp_path / "out")] == ["step-000002"]
    train(train_settings(), tmp_path / "out")
    assert losses(tmp_path / "out") == losses(unbroken)


def test_a_loss_that_is_not_finite_names_step_sample_and_checkpoint(
    train_settings: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    config = train_settings(learning_rate=1e30, save_every=1, steps=6, evaluate_every=6)
    with pytest.raises(
        TrainingError, match=r"the loss is nan in step \d .*text.txt.*last good checkpoint is .*step-0000"
    ):
        train(config, tmp_path / "out")


def flip(path: Path, at: float) -> None:
    """Change one bit, at a share of a file's length."""
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 1
    path.write_bytes(content)


def test_one_bit_anywhere_in_a_checkpoint_is_found(unbroken: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint.all_of(unbroken)[-1], tmp_path / "step-000006")
    assert not checkpoint.fault(folder)
    names = {path.name for path in folder.iterdir()} - {"README.md"}
    assert {"adapter_model.safetensors", "optimizer.pt", "state.json", "checksums.json"} < names
    for name, at in itertools.product(names, (0, 0.1, 0.3, 0.5, 0.7, 0.99, 1)):
        flip(folder / name, at)
        assert checkpoint.fault(folder), (name, at)
        flip(folder / name, at)
    assert not checkpoint.fault(folder)
    for name in names:
        (folder / name).rename(tmp_path / "gone")
        assert checkpoint.fault(folder), name
        (tmp_path / "gone").rename(folder / name)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt"])
def test_behind_a_damaged_checkpoint_it_goes_on_from_the_one_before(
    name: str, train_settings: Callable[..., TrainConfig], unbroken: Path, tmp_path: Path
) -> None:
    output = shutil.copytree(unbroken, tmp_path / "out")
    folder = checkpoint.all_of(output)[-1]
    flip(folder / name, 0.7)
    notes: list[str] = []
    train(train_settings(), output, notify=notes.append)
    said = f"The checkpoint {folder} is damaged ({name} is not what was written); it is set aside, and the one before"
    assert [note.startswith(said) for note in notes] == [True, False]
    assert notes[1] == "Going on after step 4 of 6."
    assert losses(output) == losses(unbroken)
    first, second = weights(output), weights(unbroken)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert folder.with_name("damaged-step-000006").exists()


def test_no_adapter_is_made_of_a_damaged_best_checkpoint(
    train_settings: Callable[..., TrainConfig], unbroken: Path, tmp_path: Path
) -> None:
    output = shutil.copytree(unbroken, tmp_path / "out")
    before, newest = checkpoint.all_of(output)[-2:]
    state = json.loads((newest / "state.json").read_text())
    (newest / "state.json").write_text(json.dumps({**state, "best": {"loss": -1.0, "step": 4}}))
    checkpoint.write_sums(newest)
    flip(before / "adapter_model.safetensors", 0.7)
    notes: list[str] = []
    train(train_settings(), output, notify=notes.append)
    assert f"The best checkpoint {before} is damaged" in notes[-1]
    assert read_adapter_steps(output) == 6


def test_a_damaged_checkpoint_without_another_is_named(
    train_settings: Callable[..., TrainConfig], unbroken: Path, tmp_path: Path
) -> None:
    output = shutil.copytree(unbroken, tmp_path / "out")
    for folder in checkpoint.all_of(output):
        (folder / "optimizer.pt").write_bytes(b"junk")
    with pytest.raises(
        TrainingError, match=r"step-000006 is damaged \(optimizer.pt is not .*use another output folder"
    ):
        train(train_settings(), output)


def saved(output: Path, *steps: int) -> list[str]:
    """Write checkpoints without a training; the names of all."""
    for step in steps:
        checkpoint.save(output, step, {}, {}, lambda folder: (folder / "adapter_model.safetensors").touch() or None)
    return [path.name for path in checkpoint.all_of(output)]


def test_killed_while_old_checkpoints_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, 1, 2, 3, 4)

    def dying(folder: Path, **_: Any) -> None:
        (folder / "optimizer.pt").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", dying)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.prune(tmp_path, 2, None)
    assert saved(tmp_path) == ["step-000002", "step-000003", "step-000004"]
    assert [checkpoint.fault(path) for path in checkpoint.all_of(tmp_path)] == ["", "", ""]
    (tmp_path / "checkpoints" / "step-000001").mkdir()  # as an earlier version leaves them
    (tmp_path / "checkpoints" / "step-000001" / "optimizer.pt").touch()
    checkpoint.clear(tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == saved(tmp_path)
    for name in ("optimizer.pt", "checksums.json"):
        (tmp_path / "checkpoints" / "step-000004" / name).unlink()
    assert checkpoint.newest(tmp_path)[0] == tmp_path / "checkpoints" / "step-000003"


@pytest.mark.parametrize("mask", [0o077, 0o002])
def test_checkpoints_have_the_modes_that_the_user_wants(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        saved(tmp_path, 1)
    finally:
        os.umask(before)
    (folder,) = checkpoint.all_of(tmp_path)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~mask
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o666 & ~mask}


def test_names_that_are_no_utf8(train_settings: Callable[..., TrainConfig], tmp_path: Path) -> None:
    source = tmp_path / os.fsdecode(b"caf\xe9.txt")
    try:
        source.write_text(TEXT)
    except OSError:
        pytest.skip("a file system that has none")
    read: list[str] = []
    output = tmp_path / os.fsdecode(b"out\xe9")
    train(train_settings(steps=1, sources=[str(source)]), output, reading=lambda name, _: read.append(name))
    assert read[-1].endswith(r"caf\udce9.txt")
    assert r"caf\udce9.txt" in (output / "adapter" / "README.md").read_text()
    train(train_settings(steps=1, sources=[str(source)]), output)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"sources": []}, ConfigError, "there are no sources"),
        ({"sources": ["nowhere"]}, DocumentError, "there is no file or folder nowhere"),
        ({"chunk_lengths": [3000], "memory_lengths": [3000]}, ConfigError, "has 512; use smaller"),
        (
            {"refresh_rows": -1},
            ConfigError,
            "refresh_rows is -1; it must be a whole number of at least 1, or 0 for all",
        ),
        ({"refresh_rows": 2, "supervision": "exact"}, ConfigError, 'refresh_rows is 2 with supervision = "exact"'),
        ({"refresh_rows": 2, "sharded": True}, ConfigError, "refresh_rows is 2 with sharded = true"),
        ({"distractors": [True]}, ConfigError, "distractors is"),
        ({"distractors": [200]}, ConfigError, "from 0 to distractor_pool, which is 128"),
        ({"distractors": [100], "local_lengths": [440]}, ConfigError, "or fewer distractors"),
        ({"distractor_pool": 0}, ConfigError, "distractor_pool is 0"),
        ({"noise": 1}, ConfigError, "noise is 1; it must be at least 0 and below 1"),
        ({"memories_per_step": 0}, ConfigError, "memories_per_step is 0"),
        ({"objectives": {"magic": 1}}, ConfigError, "objectives has magic; known are continuation"),
        ({"objectives": {"stories": 1}}, ConfigError, "stories names no files"),
        ({"objectives": {"facts": 0}}, ConfigError, "not all 0"),
        ({"chunk_lengths": []}, ConfigError, "chunk_lengths is"),
        ({"chunk_lengths": [256]}, ConfigError, "memory_lengths only to 128"),
        ({"learning_rate": "fast"}, ConfigError, "learning_rate is 'fast'; it must be a finite number"),
        ({"final_learning_rate": float("nan")}, ConfigError, "final_learning_rate is nan; it must be a finite number"),
        ({"final_learning_rate": -3}, ConfigError, "weight_decay and final_learning_rate at least 0"),
        ({"objectives": {"facts": float("inf")}}, ConfigError, "facts is inf; it must be a finite number"),
        ({"seed": 10**30}, ConfigError, "it must be below"),
        ({"sources": [{"path": 5}]}, ConfigError, "the path of a source is 5; it must be a text"),
        ({"sources": [{"path": "x", "weight": float("inf")}]}, ConfigError, "the weight of x is inf"),
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
        ({"sources": ["a" * 300]}, DocumentError, "there is no file or folder aaa"),
        ({"sources": ["a\nb\0c"]}, DocumentError, r"there is no file or folder a\\nb\\x00c; name one"),
        ({"init_adapter": "a" * 300}, AdapterError, "there is no adapter folder aaa"),
        ({"stories": ["a" * 300], "objectives": {"stories": 1}}, DocumentError, r"a cannot be read \(File name too"),
    ],
)
def test_settings_that_cannot_work(
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
    train_settings: Callable[..., TrainConfig],
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=message):
        train(train_settings(**changes), tmp_path / "out")


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
    (tmp_path / "b.toml").write_text(f"steps = {'[' * 5000}")
    with pytest.raises(ConfigError, match="are nested too deeply"):
        TrainConfig.from_file(tmp_path / "b.toml")
    for encoding in ("utf-8-sig", "utf-16"):  # as Windows writes them
        (tmp_path / "b.toml").write_text("steps = 8", encoding=encoding)
        assert TrainConfig.from_file(tmp_path / "b.toml").steps == 8
    with pytest.raises(ConfigError, match=r"cannot be read \(File name too long\)"):
        TrainConfig.from_file("a" * 300)


def test_loaders_draw_the_same_samples(train_settings: Callable[..., TrainConfig], tmp_path: Path) -> None:
    """Ahead of time in two processes of their own, stopped, gone on with without: the same training bit for bit."""
    train(train_settings(), tmp_path / "inline")

    def stop(entry: dict[str, Any]) -> None:
        if entry["step"] == 3 and "loss" in entry:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(train_settings(loaders=2), tmp_path / "loaded", report=stop)
    train(train_settings(), tmp_path / "loaded")
    assert losses(tmp_path / "loaded") == losses(tmp_path / "inline")
    first, second = weights(tmp_path / "loaded"), weights(tmp_path / "inline")
    assert all(torch.equal(first[name], second[name]) for name in second)
