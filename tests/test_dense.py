"""Dense supervision is cached decoding, teacher-forced: against the slow reference, position by position."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import reference
from conftest import build, random_ids, with_candidates
from focusllm import AdapterConfig
from focusllm.method.adapter import trainable_parameters
from focusllm.method.focus import encode_chunks
from focusllm.training.dense import LABELS_PER_PASS, Sample, dense_logits, dense_loss, exact_loss, packs_of

CHUNKS = torch.tensor(random_ids(48)).view(3, 16)
# Longer and shorter than their prompts, with one label and with many, and one that is nothing but a token and a label.
SAMPLES = [
    Sample(random_ids(20, 1), 5, 6),
    Sample(random_ids(9, 2), 3, 50),
    Sample(random_ids(30, 3), 1, 1),
    Sample(random_ids(2, 4), 1, 4),
    Sample(random_ids(11, 5), 10, 1),
]


def trainable(model: nn.Module) -> nn.Module:
    for parameter in trainable_parameters(model).values():
        parameter.requires_grad_(True)
    return model


def gradients(model: nn.Module) -> torch.Tensor:
    found = torch.cat([parameter.grad.flatten() for parameter in trainable_parameters(model).values()])
    model.zero_grad()
    return found


def stepwise(model: nn.Module, sink: int | None = None) -> torch.Tensor:
    rows = []
    for sample in SAMPLES:
        ids, newest = list(sample.token_ids), sample.newest
        prompt, local = ids[sample.start : newest + 1], ids[: newest + 1]
        for step in range(sample.num_answers):
            generated = ids[newest + 1 : newest + 1 + step]
            rows.append(reference.cached_logits(model, CHUNKS.tolist(), prompt, local, generated, sink))
    return torch.stack(rows)


@pytest.mark.parametrize(
    "config",
    [AdapterConfig(), AdapterConfig(rank=4), AdapterConfig(rank=2, alpha=8.0), AdapterConfig(rank=4, sink_token=7)],
)
def test_equals_decoding_step_by_step(config: AdapterConfig) -> None:
    model = trainable(with_candidates(build(), config))
    kv = encode_chunks(model, CHUNKS)
    expected = stepwise(model, config.sink_token)
    torch.testing.assert_close(dense_logits(model, kv, SAMPLES), expected, atol=2e-5, rtol=0)
    with torch.no_grad():  # by the kernels that decoding uses
        torch.testing.assert_close(dense_logits(model, kv, SAMPLES), expected, atol=2e-5, rtol=0)


REFRESHED = [
    replace(sample, refreshed=rows) for sample, rows in zip(SAMPLES, [(2,), (1,), (0,), (2,), (0, 2)], strict=True)
]


@pytest.mark.parametrize("sink", [None, 7])
def test_focused_refresh_equals_decoding_step_by_step(sink: int | None) -> None:
    model = trainable(with_candidates(build(), AdapterConfig(rank=4, sink_token=sink)))
    expected = []
    for pack in packs_of(SAMPLES, 8):  # samples of a pack share their rows
        rows = {row for i in pack for row in REFRESHED[i].refreshed}
        for i in pack:
            ids, sample = list(SAMPLES[i].token_ids), SAMPLES[i]
            prompt, local = ids[sample.start : sample.newest + 1], ids[: sample.newest + 1]
            given = [ids[sample.newest + 1 : sample.newest + 1 + step] for step in range(sample.num_answers)]
            found = [
                reference.focused_logits(model, CHUNKS.tolist(), prompt, local, g, [sorted(rows)] * (len(g) + 1), sink)
                for g in given
            ]
            expected.append((i, torch.stack(found)))
    in_order = torch.cat([logits for _, logits in sorted(expected, key=lambda pair: pair[0])])
    kv = encode_chunks(model, CHUNKS)
    assert len(packs_of(SAMPLES, 8)) > 2
    assert not torch.allclose(dense_logits(model, kv, SAMPLES, labels_per_pass=8), in_order, atol=1e-3)
    logits = dense_logits(model, kv, REFRESHED, labels_per_pass=8)
    torch.testing.assert_close(logits, in_order, atol=2e-5, rtol=0)
    logits.square().sum().backward()
    once = gradients(model)
    in_order.square().sum().backward()
    torch.testing.assert_close(once, gradients(model), atol=1e-3 * float(once.abs().max()), rtol=0)
    dense_logits(model, kv, REFRESHED, checkpointed=True, labels_per_pass=8).square().sum().backward()
    assert torch.equal(gradients(model), once)


@pytest.mark.parametrize("family", ["llama-yarn", "qwen3", "gemma", "phi3", "smollm3", "stablelm", "glm4"])
def test_families_agree_with_and_without_gradients(family: str) -> None:
    model = trainable(with_candidates(build(family)))
    kv = encode_chunks(model, CHUNKS)
    with_graph = dense_logits(model, kv, SAMPLES)
    with torch.no_grad():
        torch.testing.assert_close(dense_logits(model, kv, SAMPLES), with_graph, atol=5e-5, rtol=0)
    with_graph.square().sum().backward()
    assert gradients(model).norm() > 0


def test_gradients_equal_those_of_stepwise_decoding() -> None:
    model = trainable(with_candidates(build(dtype=torch.float64)))
    torch.set_default_dtype(torch.float64)  # the reference makes its own angles
    try:
        labels = torch.tensor([x for s in SAMPLES for x in s.token_ids[-s.num_answers :]])
        F.cross_entropy(stepwise(model), labels).backward()
    finally:
        torch.set_default_dtype(torch.float32)
    expected = gradients(model)
    dense_loss(model, encode_chunks(model, CHUNKS), SAMPLES)[0].mean().backward()
    torch.testing.assert_close(gradients(model), expected, atol=1e-9, rtol=1e-6)


def test_recomputed_passes_give_the_same_gradients() -> None:
    model = trainable(with_candidates(build()))
    kv = encode_chunks(model, CHUNKS)
    dense_loss(model, kv, SAMPLES)[0].mean().backward()
    expected = gradients(model)
    dense_loss(model, kv, SAMPLES, checkpointed=True)[0].mean().backward()
    assert expected.norm() > 0
    assert torch.equal(gradients(model), expected)


def test_packing_changes_nothing() -> None:
    model = with_candidates(build())
    kv = encode_chunks(model, CHUNKS)
    together = dense_logits(model, kv, SAMPLES)
    alone = torch.cat([dense_logits(model, kv, [sample]) for sample in SAMPLES])
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=0)
    torch.testing.assert_close(dense_logits(model, kv, SAMPLES, labels_per_pass=6), together, atol=2e-5, rtol=0)


def test_packs_hold_every_sample_once() -> None:
    samples = [Sample(random_ids(3 + length), length, 4) for length in (90, 1, 200, 40, 2, 100)]
    packs = packs_of(samples)
    assert sorted(i for pack in packs for i in pack) == list(range(6))
    assert all(sum(samples[i].num_answers for i in pack) <= LABELS_PER_PASS or len(pack) == 1 for pack in packs)


def test_the_first_label_is_the_papers_loss() -> None:
    """Before anything is generated, exact and cached decoding are the same: so are their losses and gradients."""
    model = trainable(with_candidates(build()))
    sample = Sample(random_ids(20, 1), 1, 6)
    dense, _ = dense_loss(model, encode_chunks(model, CHUNKS), [sample])
    dense.sum().backward()
    expected = gradients(model)
    ids = torch.tensor(sample.token_ids)
    exact, _ = exact_loss(model, list(CHUNKS), ids[13:-1], ids[:-1], ids[-1])
    exact.backward()
    torch.testing.assert_close(exact, dense[0])
    torch.testing.assert_close(gradients(model), expected, atol=1e-6, rtol=1e-4)


def test_hits_are_greedy_decoding() -> None:
    model = with_candidates(build())
    losses, hits = dense_loss(model, encode_chunks(model, CHUNKS), SAMPLES)
    labels = torch.tensor([x for s in SAMPLES for x in s.token_ids[-s.num_answers :]])
    logits = stepwise(model)
    torch.testing.assert_close(losses, F.cross_entropy(logits, labels, reduction="none"), atol=2e-5, rtol=0)
    assert torch.equal(hits, logits.argmax(-1) == labels)


def test_labels_may_differ_from_what_is_read() -> None:
    model = with_candidates(build())
    kv = encode_chunks(model, CHUNKS)
    others = replace(SAMPLES[0], labels=random_ids(5, 9))
    losses, _ = dense_loss(model, kv, [others])
    logits = dense_logits(model, kv, SAMPLES[:1])
    torch.testing.assert_close(losses, F.cross_entropy(logits, torch.tensor(random_ids(5, 9)), reduction="none"))


def test_trainable_weights_may_be_wider_than_the_base() -> None:
    from focusllm.method.adapter import inject

    model = build(dtype=torch.bfloat16)
    inject(model, AdapterConfig(rank=4), torch.float32)
    trainable(model)
    losses, _ = dense_loss(model, encode_chunks(model, CHUNKS), SAMPLES)
    losses.mean().backward()
    found = trainable_parameters(model).values()
    assert all(parameter.dtype == torch.float32 and parameter.grad is not None for parameter in found)
