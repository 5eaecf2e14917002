"""Distillation: the divergence against its definition, what the teacher reads and says, trainings that go on."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import build, byte_tokenizer, random_ids, with_candidates
from focusllm import TrainConfig, TrainingError, train
from focusllm.errors import ConfigError
from focusllm.method.focus import encode_chunks
from focusllm.training.config import Source
from focusllm.training.corpus import load_corpus
from focusllm.training.dense import Sample, base_logits, dense_loss
from focusllm.training.divergence import divergence, targets_of
from focusllm.training.generating import answers_to
from focusllm.training.sampling import Memory, Sampler
from focusllm.training.tasks import says
from focusllm.training.teacher import Teacher
from training import TEXT, losses, weights

ROOT = Path(__file__).parent.parent
MIXED = {"repetition": 0.3, "continuation": 0.3, "facts": 0.4}


def distilled(**changes: Any) -> dict[str, Any]:
    """Settings of a tiny distillation beside `tiny`'s."""
    return {"objective": "distill", "teacher_lengths": [96, 160], "top_k": 8, "objectives": MIXED} | changes


# --- the divergence ---------------------------------------------------------------------------------------------------


def defined(teacher: Tensor, student: Tensor, top_k: int | None, temperature: float) -> Tensor:
    """One position and one outcome at a time, in float64."""
    result = []
    for row_p, row_q in zip(teacher.double(), student.double(), strict=True):
        p, q = (row_p / temperature).softmax(0), (row_q / temperature).softmax(0)
        likeliest = row_p.argsort(descending=True)[: top_k or len(p)].tolist()
        outcomes = [(p[i], q[i]) for i in likeliest]
        if top_k and top_k < len(p):
            others = [i for i in range(len(p)) if i not in likeliest]
            outcomes.append((p[others].sum(), q[others].sum()))
        result.append(temperature**2 * torch.stack([a * (a.log() - b.log()) for a, b in outcomes]).sum())
    return torch.stack(result)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("top_k", [1, 5, 40, None])
def test_the_divergence_is_its_definition(top_k: int | None, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = 4 * torch.randn(6, 40, generator=generator)
    student = (4 * torch.randn(6, 40, generator=generator)).requires_grad_()
    weight = torch.randn(6, generator=generator)
    found = divergence(student, targets_of(teacher, top_k, temperature))
    (gradient,) = torch.autograd.grad((found * weight).sum(), student)
    wanted = defined(teacher, student, top_k, temperature)
    (wanted_gradient,) = torch.autograd.grad((wanted * weight).sum(), student)
    torch.testing.assert_close(found, wanted.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-4, atol=1e-5)
    assert (found > 0).all()
    torch.testing.assert_close(divergence(teacher, targets_of(teacher, top_k, temperature)), torch.zeros(6))


def test_the_rest_is_one_outcome() -> None:
    """So a student must be as sure of it, whatever it makes of the tokens in it; and surer teachers lose nothing."""
    teacher = torch.tensor([[5.0, 4.0, 1.0, 1.0]])
    targets = targets_of(teacher, 2)
    torch.testing.assert_close(targets.log_probs.exp().sum(1), torch.ones(1))
    mass = teacher.logsumexp(1) - teacher[:, :2].logsumexp(1)
    assert mass > 0
    moved = torch.tensor([[5.0, 4.0, float(teacher[0, 2:].logsumexp(0)), -50.0]])
    assert float(divergence(moved, targets)) == pytest.approx(0, abs=1e-6)
    assert float(divergence(moved, targets_of(teacher, None))) > 0.01
    sure = targets_of(torch.tensor([[200.0, 0.0, 0.0, 0.0]]), 2)
    assert torch.isfinite(divergence(torch.zeros(1, 4), sure)).all()


def test_samples_with_and_without_a_teacher_in_one_pass() -> None:
    model = with_candidates(build())
    kv = encode_chunks(model, torch.tensor(random_ids(24)).view(3, 8))
    plain = [Sample(random_ids(12, seed), 4, 4) for seed in (1, 2)]
    teacher = torch.randn(4, 260, generator=torch.Generator().manual_seed(0))
    taught = [plain[0], replace(plain[1], targets=targets_of(teacher, 16))]
    before, hits = dense_loss(model, kv, plain)
    after, same_hits = dense_loss(model, kv, taught)
    assert torch.equal(before[:4], after[:4])
    assert not torch.equal(before[4:], after[4:])
    assert torch.equal(hits, same_hits)
    after[4:].sum().backward()
    assert any(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in model.parameters())


# --- what the teacher reads and says ----------------------------------------------------------------------------------


def sampler_of(config: TrainConfig, text: Path, folder: Path) -> Sampler:
    tokenizer = byte_tokenizer()
    return Sampler(config, tokenizer, [(load_corpus(Source(str(text)), tokenizer, folder), 1.0)])


@pytest.fixture
def memory_of(train_settings: Callable[..., TrainConfig], base: Path, tmp_path: Path) -> Callable[..., Memory]:
    """A memory of a distillation whose settings are changed as needed."""

    def draw(step: int = 0, **changes: Any) -> Memory:
        settings = {"memory_lengths": [256], "local_lengths": [64], "answer_length": 24} | changes
        return sampler_of(train_settings(**distilled(**settings)), base / "text.txt", tmp_path / "corpora").draw(
            step, 0
        )

    return draw


def test_the_teacher_of_a_continuation_reads_the_text_before(memory_of: Callable[..., Memory]) -> None:
    memory = memory_of(objectives={"continuation": 1.0}, teacher_lengths=[16, 100])
    for sample in memory.samples:
        text = list(sample.token_ids[: -sample.num_answers])
        assert len(sample.window) == 100
        assert list(sample.window)[-len(text) :] == text
        assert sample.truth is None


@pytest.mark.parametrize("local_facts", [0.0, 0.99])
def test_the_teacher_of_a_question_reads_the_passage(memory_of: Callable[..., Memory], local_facts: float) -> None:
    tokenizer, seen = byte_tokenizer(), 0
    for step in range(6):
        memory = memory_of(step, objectives={"facts": 1.0}, teacher_lengths=[160], local_facts=local_facts)
        for sample in memory.samples:
            if sample.objective != "facts":
                continue
            assert sample.truth is not None
            window, asked = tokenizer.decode(sample.window), tokenizer.decode(sample.token_ids[: -sample.num_answers])
            question = asked[asked.rindex("\n\n") :]
            assert sample.truth in window[: -len(question)]
            assert window.endswith(question)
            assert window.startswith("<s>")
            assert sample.truth in tokenizer.decode(sample.answers)
            if sample.truth not in asked:
                seen += 1
                assert abs(len(sample.window) - 160 - len(question)) < 6  # the control tokens are one each
    assert seen > 3 or local_facts


def test_repetitions_have_no_teacher_and_labels_alone_are_as_before(memory_of: Callable[..., Memory]) -> None:
    assert all(not sample.window for sample in memory_of(objectives={"repetition": 1.0}).samples)
    for name in ("continuation", "facts"):
        labels = memory_of(objective="labels", objectives={name: 1.0})
        assert all(not sample.window and sample.truth is None for sample in labels.samples)
        if name == "continuation":
            distilled = memory_of(objectives={name: 1.0})
            assert [s.token_ids for s in distilled.samples] == [s.token_ids for s in labels.samples]


def test_a_table_longer_than_the_teachers_window_keeps_its_true_tokens(memory_of: Callable[..., Memory]) -> None:
    samples = [
        s for step in range(4) for s in memory_of(step, objectives={"tables": 1.0}, teacher_lengths=[20]).samples
    ]
    tables = [sample for sample in samples if sample.objective == "tables"]
    assert tables
    assert all(not sample.window for sample in tables)


def test_answers_are_the_models_own_whatever_it_is_padded_by() -> None:
    """Token by token the likeliest one, and the logits that it was chosen by."""
    model, tokenizer = build(), byte_tokenizer()
    model.generation_config.repetition_penalty = 1.7  # of which a teacher knows nothing
    prompts = [random_ids(count, seed=count) for count in (9, 3, 30)]
    for prompt, (answer, logits) in zip(prompts, answers_to(model, tokenizer, prompts, 6), strict=True):
        text = list(prompt)
        for token, row in zip(answer, logits, strict=True):
            wanted = base_logits(model, [*text, 0], 1)[0]
            torch.testing.assert_close(row, wanted, rtol=1e-4, atol=1e-4)
            assert token == int(wanted.argmax())
            text.append(token)
    first, again, other = (
        [a for a, _ in answers_to(model, tokenizer, prompts, 6, temperature=1.0, seed=seed)] for seed in (1, 1, 2)
    )
    assert first == again != other


def test_only_right_answers_are_taken(memory_of: Callable[..., Memory], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = with_candidates(build(max_position_embeddings=512)), byte_tokenizer()
    memory = memory_of(objectives={"facts": 1.0})
    truths = [sample.truth for sample in memory.samples if sample.truth is not None]
    assert len(truths) > 1

    def made(model: Any, tokenizer: Any, prompts: list[list[int]], *_: Any) -> list[tuple[list[int], Tensor]]:
        said = [f"It is {truths[0]}, I think.", *["I do not know."] * (len(prompts) - 1)]
        ids = [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in said]
        return [(one, torch.randn(len(one), 260)) for one in ids]

    monkeypatch.setattr("focusllm.training.teacher.answers_to", made)
    config = TrainConfig.from_dict(distilled())
    taught = Teacher(model, tokenizer, config).taught(memory)
    pairs = [(a, b) for a, b in zip(memory.samples, taught.samples, strict=True) if a.truth is not None]
    before, right = pairs[0]
    assert right.objective == "facts"
    assert right.targets is not None
    assert tokenizer.decode(right.answers) == f"It is {truths[0]}, I think.</s>"
    assert right.newest == before.newest
    assert right.targets.log_probs.shape == (right.num_answers, 9)
    for before, wrong in pairs[1:]:
        assert wrong.objective == "facts, true tokens"
        assert wrong.targets is None
        assert wrong.token_ids == before.token_ids


@pytest.mark.parametrize(
    ("text", "answer", "is_in"),
    [
        ("It is Amber  Fox.", "amber fox", True),
        ("1234", "12", False),
        ("the PIN is 12.", "12.", True),
        ("", "x", False),
        ("anything", " ", False),
        ("a+b(c)", "b(c)", True),
    ],
)
def test_says(text: str, answer: str, is_in: bool) -> None:
    assert says(text, answer) is is_in


# --- trainings --------------------------------------------------------------------------------------------------------


def test_a_student_approaches_its_teacher(train_settings: Callable[..., TrainConfig], tmp_path: Path) -> None:
    """On the same memory again and again, with a model that is surer than one with small random weights."""
    build(max_position_embeddings=512, initializer_range=0.2).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    config = train_settings(
        **distilled(objectives={"continuation": 1.0}, top_k=32, teacher_lengths=[128], kept_memories=1),
        model=str(tmp_path / "model"), memories_per_step=1, rank=16, steps=15, learning_rate=0.02, evaluate_every=15,
    )  # fmt: skip
    seen: list[dict[str, Any]] = []
    train(config, tmp_path / "out", report=seen.append)
    found = [entry["loss"] for entry in seen if "loss" in entry]
    assert np.mean(found[-3:]) < 0.3 * found[0]


@pytest.mark.parametrize("kept", [0, 3])
def test_goes_on_bit_for_bit(train_settings: Callable[..., TrainConfig], tmp_path: Path, kept: int) -> None:
    config = train_settings(
        **distilled(kept_memories=kept, answer_temperature=0.7), steps=4, memories_per_step=1, evaluate_every=4
    )

    def interrupt(entry: dict[str, Any]) -> None:
        if "loss" in entry and entry["step"] == 2:
            signal.raise_signal(signal.SIGINT)

    train(config, tmp_path / "unbroken")
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "out", report=interrupt)
    shards = sorted((tmp_path / "out" / "teacher").glob("*/*"))
    for shard in shards[:2]:  # what a failing disk leaves is made anew
        shard.write_bytes(shard.read_bytes()[:20])
    train(config, tmp_path / "out")
    assert losses(tmp_path / "out") == losses(tmp_path / "unbroken")
    first, second = weights(tmp_path / "out"), weights(tmp_path / "unbroken")
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert len([shard for shard in shards if shard.name.startswith("train")]) == min(kept, 2)


def test_kept_answers_are_not_made_again(
    train_settings: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    original = Teacher._said
    monkeypatch.setattr(Teacher, "_said", lambda self, memory: (asked.append(memory.name), original(self, memory))[1])
    train(train_settings(**distilled(kept_memories=3), steps=4, memories_per_step=1), tmp_path / "out")
    trained = [name for name in asked if name.startswith("train")]
    assert sorted(trained) == sorted(set(trained))
    assert len(trained) == 3
    assert len({name for name in asked if name.startswith("held-out")}) == 3
    folder = next((tmp_path / "out" / "teacher").iterdir())
    train(
        train_settings(**distilled(kept_memories=3), steps=4, memories_per_step=1, save_every=3), tmp_path / "out"
    )  # changes nothing
    assert [folder] == list((tmp_path / "out" / "teacher").iterdir())


def test_nothing_held_out_is_trained_on(train_settings: Callable[..., TrainConfig], tmp_path: Path) -> None:
    """Neither as memory, nor as a local context, nor in the teacher's window."""
    (tmp_path / "test.txt").write_text(TEXT.replace("Ishmael", "~~~~~~~"))
    (tmp_path / "train.txt").write_text(TEXT)
    config = train_settings(
        **distilled(), sources=[str(tmp_path / "train.txt")], held_out=[str(tmp_path / "test.txt")], steps=1
    )
    seen: list[Memory] = []
    original = Teacher.taught
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Teacher, "taught", lambda self, m: (seen.append(original(self, m)), seen[-1])[1])
        train(config, tmp_path / "out")
    mark = ord("~") - ord("!") + 3  # of the byte tokenizer
    assert byte_tokenizer().decode([mark]) == "~"

    def has_mark(memory: Memory) -> bool:
        parts = [memory.chunks.ravel().tolist(), *(part for s in memory.samples for part in (s.token_ids, s.window))]
        return any(mark in list(part) for part in parts)

    found = {name: [has_mark(m) for m in seen if m.name.startswith(name)] for name in ("train", "held-out")}
    assert found["train"]
    assert not any(found["train"])
    assert all(found["held-out"])


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "distilled").glob("*.toml")), ids=lambda path: path.stem)
def test_recipes_train_on_nothing_that_is_evaluated_on(path: Path) -> None:
    config = TrainConfig.from_file(path)
    assert config.objective == "distill"
    for named in (*(source.path for source in config.sources), *config.questions):
        assert not {"test", "bench"} & set(Path(named).parts)
    assert not config.stories
    assert not config.multihop
    assert config.questions == (f"runs/questions-{path.stem}.jsonl",)
    commands = (path.parent / "README.md").read_text()
    asked = next(line.split() for line in commands.splitlines() if f"questions-{path.stem}.jsonl" in line)
    assert not any({"test", "bench"} & set(Path(word).parts) for word in asked)


def test_the_log_tells_right_answers_from_true_tokens(
    train_settings: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    train(train_settings(**distilled(), steps=1), tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    names = {name for line in lines if "loss" in line for name in line["objectives"]}
    assert names <= {"continuation", "repetition", "facts", "facts, true tokens"}
    assert "facts, true tokens" in names  # a random model knows nothing


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "teach"}, "objective is 'teach'; it must be labels or distill"),
        ({"objective": "distill", "sharded": True}, "sharded = true, which has no teacher"),
        ({"objective": "distill", "supervision": "exact"}, "has no teacher"),
        ({"objective": "distill", "kept_memories": 4, "top_k": 0}, r"kept_memories is 4 with top_k = 0"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"answer_temperature": -1.0}, "answer_temperature at least 0"),
        ({"temperature": "hot"}, "temperature is 'hot'; it must be a finite number"),
        ({"top_k": -1}, "top_k is -1"),
        ({"kept_memories": -1}, "kept_memories is -1"),
        ({"teacher_lengths": []}, "teacher_lengths is"),
        ({"objectives": {"questions": 1.0}}, "questions names no files"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig.from_dict(settings)


def test_a_window_beyond_the_models_positions(train_settings: Callable[..., TrainConfig], tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"a teacher's window takes up to 1136 positions, but .* 512.*teacher_lengths"
    ):
        train(train_settings(**distilled(teacher_lengths=[1000])), tmp_path / "out")


def test_another_objective_is_refused_on_resume(train_settings: Callable[..., TrainConfig], tmp_path: Path) -> None:
    train(train_settings(steps=2), tmp_path / "out")
    with pytest.raises(TrainingError, match=r"other settings \(objective is labels, now distill\)"):
        train(train_settings(steps=2, objective="distill", teacher_lengths=[64]), tmp_path / "out")
