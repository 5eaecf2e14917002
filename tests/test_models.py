"""Every supported family through `verify`; every unsupported one refused by name, with the reason."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from conftest import FAMILIES, SIZES, build, random_ids, with_candidates
from focusllm import AdapterConfig, ConfigError, FocusConfig, ModelError
from focusllm.checks.verify import verify
from focusllm.decoding.engine import decode, prefill, start_request
from focusllm.memory.chunking import count_chunks
from focusllm.memory.chunks import encode
from focusllm.method.adapter import injected
from focusllm.method.base import Rotary, layout


@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str, attention: str) -> None:
    checks = list(verify(build(family, attention)))
    assert len(checks) == 13
    assert not [check for check in checks if not check.passed]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_half_precision(family: str, dtype: torch.dtype) -> None:
    assert not [check for check in verify(build(family, dtype=dtype)) if not check.passed]


def test_verify_leaves_the_model_as_it_was() -> None:
    model = with_candidates(build())
    before = injected(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    list(verify(model))
    assert injected(model) == before
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_verify_catches_keys_moved_by_wrong_frequencies(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    wrong = layout(model).rotaries[0].inv_freq * 1.01
    monkeypatch.setattr(Rotary, "inv_freq", property(lambda _: wrong))
    assert [check.name for check in verify(model) if not check.passed] == ["keys moved equal keys computed in place"]


def test_verify_catches_lost_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    from focusllm.method.kv import GrowingKV

    append = GrowingKV.append

    def lossy(self: GrowingKV, tokens: Any) -> None:
        append(self, tokens)
        self._kv.keys[0][:, :, 0] = 0

    monkeypatch.setattr(GrowingKV, "append", lossy)
    assert "cached: step by step equals two passes a step" in [c.name for c in verify(build()) if not c.passed]


REFUSED = {
    "gpt2": ("GPT2Config", {"n_layer": 1, "n_embd": 64, "n_head": 4}, "no rotary positions"),
    "opt": (
        "OPTConfig",
        {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "ffn_dim": 64, "word_embed_proj_dim": 64},
        "no rotary positions",
    ),
    "bloom": ("BloomConfig", {"hidden_size": 64, "n_layer": 1, "n_head": 4}, "no rotary positions"),
    "llama4_text": ("Llama4TextConfig", {"num_local_experts": 2}, "layers of type chunked_attention"),
    "minicpm3": ("MiniCPM3Config", {}, "multi-head latent attention"),
    "gemma3n_text": (
        "Gemma3nTextConfig",
        {"layer_types": ["sliding_attention", "full_attention", "full_attention"], "num_kv_shared_layers": 1},
        "no keys and values of their own",
    ),
    "diffllama": ("DiffLlamaConfig", {}, "do not call transformers' attention function once each"),
    "doge": ("DogeConfig", {}, "a layer has a mask of its own"),
    "mamba": ("MambaConfig", {}, "layers of type linear_attention"),
    "qwen3_next": ("Qwen3NextConfig", {"head_dim": 16, "num_experts": 2}, "layers of type linear_attention"),
    "gpt_neox": ("GPTNeoXConfig", {}, "projections"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    config_class, extra, reason = REFUSED[name]
    config = getattr(transformers, config_class)(**{**SIZES, **extra})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with pytest.raises(ModelError) as raised:
        layout(model)
    assert f"{name.split('-')[0]} models are not supported" in str(raised.value)
    assert reason in str(raised.value)


def test_a_window_over_all_positions_limits_nothing() -> None:
    model = build("mistral", sliding_window=256)
    assert layout(model).max_positions == 256
    assert layout(model).window is None


def test_what_each_layer_sees_and_is_rotated_by() -> None:
    """Asked of the model, on the meta device too; the model is left as it was."""
    with torch.device("meta"):
        model = build("cohere2")
    found = layout(model)
    assert [(layer.window, layer.rotary is None) for layer in found.layers] == [(10, False), (None, True), (10, False)]
    assert not [
        name for module in model.modules() for name in ("forward", "_forward_hooks") if module.__dict__.get(name)
    ]
    frequencies = [layer.rotary.inv_freq[-1].item() for layer in layout(build("gemma3_text")).layers if layer.rotary]
    assert frequencies[0] == frequencies[2] > frequencies[1]
    one = layout(build("granite_swa", "eager"))
    assert [layer.rotary and layer.rotary.inv_freq[-1] > 1e-3 for layer in one.layers] == [False, None, True]
    assert len(one.rotaries) == 2


def test_the_table_of_models_is_what_the_program_says() -> None:
    """A sample of docs/models.md."""
    root = Path(__file__).parent.parent
    spec = importlib.util.spec_from_file_location("models_table", root / "benchmarks" / "models_table.py")
    assert spec is not None
    assert spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    lines = (root / "docs" / "models.md").read_text().splitlines()
    for name in (
        "diffllama",
        "doge",
        "dots1",
        "gemma2",
        "gpt2",
        "gpt_oss",
        "llama",
        "longcat_flash",
        "mamba",
        "marian",
        "mistral",
        "qwen3_5_text",
    ):
        assert program.render([program.row(name)]).splitlines()[-1] in lines


def test_encoder_decoder_is_refused() -> None:
    config = transformers.T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=50)
    with pytest.raises(ModelError, match="t5 models are not supported: it is an encoder-decoder"):
        layout(transformers.T5ForConditionalGeneration(config))


def test_model_without_head_is_refused() -> None:
    config = transformers.LlamaConfig(**SIZES)
    with pytest.raises(ModelError, match="not a causal language model"):
        layout(transformers.LlamaModel(config))


def test_positions_of_scalings_that_change_with_the_length() -> None:
    parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    assert layout(build(rope_parameters=parameters)).max_positions == 64
    assert layout(build()).max_positions == 256


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chunk_length": 0}, "chunk_length is 0"),
        ({"local_length": -3}, "local_length is -3"),
        ({"prompt_length": True}, "prompt_length is True"),
        ({"chunks_per_batch": 1.5}, "chunks_per_batch is 1.5"),
        ({"chunk_length": 8, "chunk_overlap": 8}, "chunk_overlap is 8; it must be a whole number from 0 to below"),
        ({"decoding": "fast"}, "decoding is 'fast'"),
        ({"plain_below": "x"}, "plain_below is 'x'"),
        ({"bos_token_id": -1}, "bos_token_id is -1"),
        ({"rechunk": "maybe"}, "rechunk is 'maybe'"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FocusConfig(**settings)


@pytest.mark.parametrize(("chunk_length", "overlap"), [(1024, 64), (256, 64), (100, 25), (3, 0), (1, 0)])
def test_what_chunks_share_by_default(chunk_length: int, overlap: int) -> None:
    config = FocusConfig(chunk_length=chunk_length)
    assert config.overlap == overlap
    assert config.to_dict()["chunk_overlap"] is None
    assert config.resolved().to_dict()["chunk_overlap"] == overlap


def test_unknown_setting() -> None:
    with pytest.raises(ConfigError, match="unknown setting window"):
        FocusConfig().replace(window=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"up to 712 local tokens takes 912 positions, .* has 256; use a smaller local_length"),
        ({"local_length": 40}, "use a chunk_length of at most 176, or a smaller local_length"),
        ({"local_length": 150}, "use a chunk_length of at most 53, or a smaller local_length"),
        (
            {"rechunk": False, "bos_token_id": 1},
            "prompt of 65 tokens takes 265 positions, .* at most 191, or",
        ),
    ],
)
def test_lengths_beyond_the_positions(settings: dict[str, Any], message: str) -> None:
    config = FocusConfig(**{"chunk_length": 200, "local_length": 512, **settings})
    with pytest.raises(ConfigError, match=message) as error:
        config.check_positions(layout(build()).max_positions)
    advised = re.search("at most ([0-9]+)", str(error.value))
    if advised is not None:  # it would do, and one more would not
        largest = config.replace(chunk_length=int(advised[1]))
        largest.check_positions(256)
        with pytest.raises(ConfigError):
            largest.replace(chunk_length=largest.chunk_length + 1).check_positions(256)


@pytest.mark.parametrize("local_length", [20, 60])
@pytest.mark.parametrize("overlap", [None, 0, 7])
def test_too_many_chunks(local_length: int, overlap: int | None) -> None:
    """The chunk length that is named would do, whatever it makes of the rest."""
    config = FocusConfig(chunk_length=24, local_length=local_length, chunk_overlap=overlap)
    length = 7000
    with pytest.raises(ConfigError, match="use a chunk_length of at least") as error:
        config.check_num_chunks(count_chunks(length, config), 256)
    longer = config.replace(chunk_length=int(str(error.value).rstrip(".").split()[-1]))
    longer.check_num_chunks(count_chunks(length, longer), 256)
    with pytest.raises(ConfigError, match="no chunk_length holds many more than"):
        config.check_num_chunks(count_chunks(10**6, config), 256)


@pytest.mark.parametrize("sink", [None, 3])
def test_the_last_position_is_used(sink: int | None) -> None:
    """As many chunks as there may be: the local context grows up to the last position, and then is refused."""
    model = build(max_position_embeddings=64)
    config = FocusConfig(chunk_length=8, chunk_overlap=0, local_length=8, prompt_length=4)
    with_candidates(model, AdapterConfig(sink_token=sink))
    request = start_request(model, encode(model, random_ids(48 * 8), config), random_ids(8), config)
    prefill(model, request, config)
    for token in random_ids(7):
        assert decode(model, [request], [token], config).isfinite().all()
    with pytest.raises(ConfigError, match="49 chunks need 49 positions beside 16"):
        decode(model, [request], [7], config)


def test_paper_preset() -> None:
    config = FocusConfig.paper()
    assert (config.chunk_length, config.local_length, config.prompt_length) == (2048, 2048, 512)
    assert (config.decoding, config.rechunk, config.plain_below, config.bos_token_id) == ("exact", False, 4096, 1)
    assert config.is_plain(4095)
    assert not config.is_plain(4096)
