"""The ecosystem's way: transformers' `generate()`, pipelines, saving and loading."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    MaxTimeCriteria,
    StoppingCriteriaList,
    TextStreamer,
    pipeline,
    set_seed,
)

from conftest import SMALL, build, byte_tokenizer, random_ids, with_candidates
from focusllm import AdapterConfig, ConfigError, FocusForCausalLM, FocusState, MemoryLimitError, ModelError
from focusllm.decoding.engine import decode, prefill, start_request
from focusllm.memory.chunking import split
from focusllm.memory.chunks import encode
from focusllm.method.adapter import injected
from focusllm.method.attention import _later_tokens
from focusllm.method.base import CACHE_NAME, run_plain

TEXT = torch.tensor([random_ids(110)])


@pytest.fixture
def model() -> FocusForCausalLM:
    return FocusForCausalLM(with_candidates(build(eos_token_id=None)), SMALL)


def greedy(model: FocusForCausalLM, ids: list[int], count: int) -> list[int]:
    """Greedy tokens straight from the engine."""
    far, local = split(ids, SMALL)
    request = start_request(model.base, encode(model.base, far, SMALL), local, SMALL)
    logits, tokens = prefill(model.base, request, SMALL)[-1], []
    for _ in range(count):
        tokens.append(int(logits.argmax()))
        logits = decode(model.base, [request], tokens[-1:], SMALL)[0]
    return tokens


def test_greedy_equals_the_engine(model: FocusForCausalLM) -> None:
    assert model.generate(TEXT, max_new_tokens=30)[0, 110:].tolist() == greedy(model, TEXT[0].tolist(), 30)


def test_short_text_equals_the_base(model: FocusForCausalLM) -> None:
    ours = model.generate(TEXT[:, :20], max_new_tokens=15, output_logits=True, return_dict_in_generate=True)
    base = build(eos_token_id=None).generate(
        TEXT[:, :20], max_new_tokens=15, output_logits=True, return_dict_in_generate=True
    )
    assert torch.equal(ours.sequences, base.sequences)
    assert all(torch.equal(a, b) for a, b in zip(ours.logits, base.logits, strict=True))


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_equals_single_runs(model: FocusForCausalLM, side: str) -> None:
    lengths = [110, 64, 12]
    ids, mask = torch.zeros(3, 110, dtype=torch.long), torch.zeros(3, 110, dtype=torch.long)
    for row, length in enumerate(lengths):
        place = slice(110 - length, 110) if side == "left" else slice(0, length)
        ids[row, place], mask[row, place] = TEXT[0, :length], 1
    batch = model.generate(ids, attention_mask=mask, max_new_tokens=30)[:, 110:]
    for row, length in enumerate(lengths):
        assert batch[row].tolist() == greedy(model, TEXT[0, :length].tolist(), 30)


def test_sampling_follows_the_seed(model: FocusForCausalLM) -> None:
    def sample(seed: int) -> list[int]:
        set_seed(seed)
        return model.generate(TEXT, max_new_tokens=12, do_sample=True, top_k=50, temperature=1.5)[0].tolist()

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_return_sequences_share_the_read(model: FocusForCausalLM) -> None:
    set_seed(0)
    state = FocusState()
    out = model.generate(TEXT, max_new_tokens=8, do_sample=True, num_return_sequences=3, cache=state)
    assert len({tuple(row) for row in out.tolist()}) == 3
    assert len({id(request.blocks[0].kv) for request in state.requests}) == 1


def test_beams_equal_rescored_beams(model: FocusForCausalLM) -> None:
    """The best beam's score is the sum of the log-probabilities that greedy steps along it give."""
    out = model.generate(
        TEXT, max_new_tokens=6, num_beams=3, length_penalty=0.0, output_scores=True, return_dict_in_generate=True
    )
    tokens = out.sequences[0, 110:].tolist()
    far, local = split(TEXT[0].tolist(), SMALL)
    request = start_request(model.base, encode(model.base, far, SMALL), local, SMALL)
    logits, total = prefill(model.base, request, SMALL)[-1], 0.0
    for token in tokens:
        total += logits.log_softmax(-1)[token].item()
        logits = decode(model.base, [request], [token], SMALL)[0]
    assert out.sequences_scores[0].item() == pytest.approx(total, abs=1e-3)


def test_logits_processors_and_stopping_criteria(model: FocusForCausalLM) -> None:
    class Only(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            mask = torch.full_like(scores, -torch.inf)
            mask[:, 77] = 0
            return scores + mask

    out = model.generate(TEXT, max_new_tokens=5, logits_processor=LogitsProcessorList([Only()]))
    assert out[0, 110:].tolist() == [77] * 5
    stop = StoppingCriteriaList([MaxTimeCriteria(max_time=0.0)])
    assert model.generate(TEXT, max_new_tokens=50, stopping_criteria=stop).shape[1] == 111


def test_stop_strings_and_streamer(model: FocusForCausalLM, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = byte_tokenizer()
    text = tokenizer.decode(model.generate(TEXT, max_new_tokens=20)[0, 110:])
    stop = next(character for character in text[4:] if character != "\ufffd" and text.index(character) >= 4)
    out = model.generate(TEXT, max_new_tokens=20, stop_strings=[stop], tokenizer=tokenizer)
    assert tokenizer.decode(out[0, 110:]) == text[: text.index(stop) + 1]
    model.generate(TEXT, max_new_tokens=20, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.strip() == text.strip()


@pytest.mark.filterwarnings("default")
def test_pipeline(model: FocusForCausalLM) -> None:
    generator = pipeline("text-generation", model=model, tokenizer=byte_tokenizer())
    text = "a long text " * 12
    out = generator(text, max_new_tokens=6, do_sample=False, return_full_text=False)[0]["generated_text"]
    ids = byte_tokenizer()(text).input_ids
    assert out == byte_tokenizer().decode(greedy(model, ids, 6))


@pytest.mark.parametrize("adapter", [AdapterConfig(), AdapterConfig(rank=4, alpha=8)])
def test_saved_and_loaded(tmp_path: Path, adapter: AdapterConfig) -> None:
    model = FocusForCausalLM(with_candidates(build(eos_token_id=None), adapter), SMALL)
    expected = model.generate(TEXT, max_new_tokens=20)
    model.save_pretrained(tmp_path)
    again = FocusForCausalLM.from_pretrained(tmp_path)
    assert again.focus_config == SMALL
    assert again.adapter_config == adapter
    assert torch.equal(again.generate(TEXT, max_new_tokens=20), expected)
    base = AutoModelForCausalLM.from_pretrained(tmp_path)  # any tool reads the folder as the base model
    assert torch.equal(base(TEXT).logits, build(eos_token_id=None)(TEXT).logits)


def test_saved_after_injecting_by_hand(tmp_path: Path, model: FocusForCausalLM) -> None:
    with_candidates(model.base, AdapterConfig("qk", rank=3, alpha=6))
    model.save_pretrained(tmp_path)
    again = FocusForCausalLM.from_pretrained(tmp_path)
    assert again.adapter_config == AdapterConfig("qk", rank=3, alpha=6)
    assert torch.equal(again.generate(TEXT, max_new_tokens=5), model.generate(TEXT, max_new_tokens=5))


def test_unloaded_and_saved_leaves_no_old_candidates(tmp_path: Path, model: FocusForCausalLM) -> None:
    model.save_pretrained(tmp_path)
    model.unload()
    model.save_pretrained(tmp_path)
    assert FocusForCausalLM.from_pretrained(tmp_path).adapter_config is None


def test_unload_gives_the_base_back(model: FocusForCausalLM) -> None:
    base = model.unload()
    assert injected(base) == {}
    assert torch.equal(base(TEXT).logits, build(eos_token_id=None)(TEXT).logits)


def test_logits_of_a_single_text(model: FocusForCausalLM) -> None:
    every = model(TEXT, logits_to_keep=0).logits
    assert every.shape == (1, SMALL.local_length, 260)
    assert model(TEXT).logits.shape == (1, 1, 260)
    torch.testing.assert_close(model(TEXT).logits[0, 0], every[0, -1], rtol=1e-5, atol=1e-5)


def test_a_state_goes_on(model: FocusForCausalLM) -> None:
    """A second call with the state and the whole text so far continues; nothing is read again."""
    state = FocusState()
    first = model.generate(TEXT, max_new_tokens=10, cache=state)
    second = model.generate(first, max_new_tokens=10, cache=state)
    assert second[0, 110:].tolist() == greedy(model, TEXT[0].tolist(), 20)


def test_a_state_goes_on_from_new_tokens_alone(model: FocusForCausalLM) -> None:
    """transformers' other form: the new tokens, and an attention mask that is as long as all of it."""
    whole, parts = FocusState(), FocusState()
    text = model.generate(TEXT, max_new_tokens=10, cache=whole)
    model.generate(TEXT, max_new_tokens=10, cache=parts)
    new = torch.tensor([random_ids(3, seed=5)])
    text = torch.cat([text, new], 1)
    expected = model.generate(text, max_new_tokens=8, cache=whole)[0, text.shape[1] :]
    unread = text[:, parts.get_seq_length() :]  # the last token of an answer has not been read
    mask = torch.ones_like(text)
    got = model.generate(unread, attention_mask=mask, max_new_tokens=8, cache=parts)
    assert torch.equal(got[0, unread.shape[1] :], expected)


@pytest.mark.parametrize("length", [110, 12], ids=["chunks", "local context alone"])
@pytest.mark.parametrize("first", [True, False])
def test_a_state_goes_on_in_and_out_of_inference_mode(model: FocusForCausalLM, length: int, first: bool) -> None:
    text, state = TEXT[:, :length], FocusState()
    with torch.inference_mode(first):
        begun = model.generate(text, max_new_tokens=10, num_beams=2, cache=state).clone()
        requests = [request.fork() for request in state.requests]
    with torch.inference_mode(not first):
        state.batch_select_indices(torch.tensor([0]))
        text = torch.cat([begun[:, : state.get_seq_length()], torch.tensor([[70]])], 1)
        assert torch.isfinite(decode(model.base, requests, [70, 70], SMALL)).all()
        out = model.generate(text, max_new_tokens=30, cache=state)
    whole = FocusState()
    model.generate(TEXT[:, :length], max_new_tokens=10, num_beams=2, cache=whole)
    whole.batch_select_indices(torch.tensor([0]))
    assert torch.equal(out, model.generate(text.clone(), max_new_tokens=30, cache=whole))


def test_documents_read_in_inference_mode_are_asked_outside(model: FocusForCausalLM) -> None:
    with torch.inference_mode():
        blocks = model.encode(TEXT[0, :90].tolist())
    expected = FocusState(model.encode(TEXT[0, :90].tolist()))
    state, local = FocusState(blocks), TEXT[:, 90:]
    again = model.generate(local, max_new_tokens=30, cache=state)
    assert torch.equal(again, model.generate(local, max_new_tokens=30, cache=expected))
    assert not any(tensor.is_inference() for block in blocks for tensor in block.resident.keys)


def test_masks_kept_in_inference_mode_can_be_trained_with() -> None:
    _later_tokens.cache_clear()
    with torch.inference_mode():
        _later_tokens(5, 2, torch.device("cpu"))
    scores = torch.zeros(10, 5, requires_grad=True)
    scores.masked_fill(_later_tokens(5, 2, scores.device), -1.0).sum().backward()
    assert scores.grad.sum() == 30


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_has_two_names(model: FocusForCausalLM, name: str) -> None:
    """transformers 5.24 renamed it; whatever it is called, every step goes on from it and none begins anew."""
    tokens = greedy(model, TEXT[0].tolist(), 30)
    state = FocusState()
    assert model.generate(TEXT, max_new_tokens=30, **{name: state})[0, 110:].tolist() == tokens
    assert state.get_seq_length() == 139
    made = model(TEXT, **{name: FocusState()})
    for token, expected in pairwise(tokens):
        made = model(torch.tensor([[token]]), **{name: made[CACHE_NAME]})
        assert int(made.logits[0, -1].argmax()) == expected
    inputs = model.prepare_inputs_for_generation(TEXT, next_sequence_length=1, **{name: state})
    assert (inputs["cache"], inputs["input_ids"].shape) == (state, (1, 1))
    with pytest.raises(ConfigError, match="two names of one thing"):
        model(TEXT, cache=state, past_key_values=FocusState())


def test_every_step_reads_one_token(model: FocusForCausalLM) -> None:
    """If generate() and forward() called the state by different names, each step would quietly begin a new one."""
    seen = []
    model.register_forward_hook(
        lambda _, args, given, made: seen.append((given["input_ids"].shape[1], made[CACHE_NAME])), with_kwargs=True
    )
    out = model.generate(TEXT, max_new_tokens=5, return_dict_in_generate=True)
    assert [length for length, _ in seen] == [110, 1, 1, 1, 1]
    assert {id(state) for _, state in seen} == {id(out[CACHE_NAME])}
    assert out[CACHE_NAME].get_seq_length() == 114


def test_a_state_that_has_read_everything_is_refused(model: FocusForCausalLM) -> None:
    state = FocusState()
    text = model.generate(TEXT, max_new_tokens=10, cache=state)
    with pytest.raises(ConfigError, match="the text has 110 tokens, and the state has read 119"):
        model.generate(text[:, :110], max_new_tokens=2, cache=state)
    with pytest.raises(ConfigError, match="no tokens behind the 119"):
        model(TEXT[:, :0], cache=state)


def test_a_refused_text_leaves_the_state_as_it_was(model: FocusForCausalLM) -> None:
    state = FocusState()
    texts, mask = torch.cat([TEXT, TEXT]), torch.ones(2, 110, dtype=torch.long)
    mask[1] = 0
    with pytest.raises(ConfigError, match="local context is empty"):
        model(texts, attention_mask=mask, cache=state)
    assert (state.get_seq_length(), state.requests) == (0, [])
    assert torch.equal(model(TEXT, cache=state).logits, model(TEXT).logits)


def test_settings_and_projections_come_from_the_hub_too(
    tmp_path: Path, model: FocusForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name with an owner goes to the hub; here the hub's answer is a folder in its format."""
    model.save_pretrained(tmp_path)
    load, asked = AutoModelForCausalLM.from_pretrained, []
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda name, **_: load(tmp_path))
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **more: asked.append((name, more)) or str(tmp_path)
    )
    loaded = FocusForCausalLM.from_pretrained("owner/model", revision="v2")
    wanted = ["focus_settings.json", "lookup_heads.json", "candidate_projections/*"]
    assert asked == [("owner/model", {"revision": "v2", "allow_patterns": wanted})]
    assert loaded.focus_config == SMALL
    torch.testing.assert_close(loaded(TEXT).logits, model(TEXT).logits, rtol=1e-5, atol=1e-5)


def test_weights_on_several_devices_are_refused() -> None:
    base = build()
    base.model.layers[1].to("meta")
    with pytest.raises(ModelError, match="lie on cpu, meta, but a pass runs on one device"):
        FocusForCausalLM(base)


def test_memory_is_checked_before_a_long_text_is_read(model: FocusForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("focusllm.memory.cost.free_memory", lambda _: 1000)
    with pytest.raises(MemoryLimitError, match="reading 90 tokens"):
        model.generate(TEXT, max_new_tokens=1)


def test_refused_uses(model: FocusForCausalLM) -> None:
    cache = DynamicCache(config=model.config)
    run_plain(build(), TEXT[:, :5], cache, 1)
    with pytest.raises(ConfigError, match="pass a FocusState"):
        model(TEXT, cache=cache)
    with pytest.raises(ConfigError, match="local context is empty"):
        model(TEXT, attention_mask=torch.zeros_like(TEXT))
    with pytest.raises(ConfigError, match="assisted generation"):
        FocusState().crop(3)
    assert not FocusState().is_croppable


@pytest.mark.parametrize("content", ["{", '{"window": 3}', '{"chunk_length": -1}', "[]"])
def test_damaged_settings(tmp_path: Path, model: FocusForCausalLM, content: str) -> None:
    model.save_pretrained(tmp_path)
    (tmp_path / "focus_settings.json").write_text(content)
    with pytest.raises(ModelError, match="is damaged"):
        FocusForCausalLM.from_pretrained(tmp_path)


def test_missing_and_damaged_models(tmp_path: Path, model: FocusForCausalLM) -> None:
    with pytest.raises(ModelError, match="cannot be loaded"):
        FocusForCausalLM.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a model")
    with pytest.raises(ModelError, match="cannot be loaded"):
        FocusForCausalLM.from_pretrained(tmp_path)
