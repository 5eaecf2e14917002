"""Tiny random models and a byte tokenizer: no network, no weights. The embedded model only where it matters."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from focusllm import AdapterConfig, Document, FocusConfig, FocusForCausalLM, FocusLLM, TrainConfig, cli, inject
from focusllm.asking import Asked, about
from focusllm.evaluation.example import Setting
from focusllm.memory.chunks import ChunkBlock
from focusllm.method.adapter import injected
from training import TEXT, tiny

torch.set_num_threads(1)  # the tests themselves are what runs in parallel
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

GOLDEN = Path(__file__).parent / "golden"
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 260,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _rope(kind: str, **extra: Any) -> dict[str, Any]:
    parameters = {"rope_type": kind, "rope_theta": 1e4, "original_max_position_embeddings": 64, **extra}
    return {"rope_parameters": parameters}


# The families that the README lists: configuration class and what it needs beyond the common sizes.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-bias": ("LlamaConfig", {"attention_bias": True}),
    "llama-llama3-rope": (
        "LlamaConfig",
        _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0),
    ),
    "llama-yarn": ("LlamaConfig", _rope("yarn", factor=4.0)),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "gemma": ("GemmaConfig", {"head_dim": 16}),
    "olmo2": ("Olmo2Config", {}),
    "phi3": ("Phi3Config", {}),
    "smollm3": ("SmolLM3Config", {"no_rope_layer_interval": 2}),
    "granite": ("GraniteConfig", {"attention_multiplier": 0.3, "residual_multiplier": 0.8, "logits_scaling": 2.0}),
    "stablelm": ("StableLmConfig", {"partial_rotary_factor": 0.25}),
    "phi": ("PhiConfig", {"partial_rotary_factor": 0.5}),
    "cohere": ("CohereConfig", {}),
    "glm4": ("Glm4Config", {"head_dim": 16}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 2, "sliding_window": None}),
    "nemotron": ("NemotronConfig", {"head_dim": 16}),
}

# Families whose layers have a sliding window, in all layers or in some; what is special besides is made to matter.
_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_TWO_ROPES = {
    "full_attention": {"rope_type": "default", "rope_theta": 1e5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
}
_MIXED = {"sliding_window": 10, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 1}
WINDOWED: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral-window": ("MistralConfig", {"sliding_window": 10}),
    "ministral": ("MinistralConfig", {**_MIXED, "head_dim": 16}),
    "qwen2-window": ("Qwen2Config", {**_MIXED, "use_sliding_window": True}),
    "gemma2": ("Gemma2Config", {**_MIXED, "head_dim": 16, "attn_logit_softcapping": 0.01, "query_pre_attn_scalar": 1}),
    "vaultgemma": (
        "VaultGemmaConfig",
        {**_MIXED, "head_dim": 16, "attn_logit_softcapping": 0.01, "query_pre_attn_scalar": 1},
    ),
    "gemma3_text": ("Gemma3TextConfig", {**_MIXED, "head_dim": 16, "rope_parameters": _TWO_ROPES}),
    "gpt_oss": (
        "GptOssConfig",
        {**_MIXED, **_EXPERTS, "head_dim": 16, "num_local_experts": 2, "rope_parameters": _PLAIN_ROPE},
    ),
    "olmo3": ("Olmo3Config", {**_MIXED, "rope_parameters": _TWO_ROPES}),
    "exaone4": ("Exaone4Config", _MIXED),
    "cohere2": ("Cohere2Config", {**_MIXED, "head_dim": 16}),
    "granite_swa": ("GraniteSWAConfig", {**_MIXED, "layer_rope_theta": [1e4, 0, 1e3]}),
    "mimo_v2_flash": (
        "MiMoV2FlashConfig",
        {
            **_MIXED,
            **_EXPERTS,
            "n_routed_experts": 2,
            "n_group": 1,
            "topk_group": 1,
            "head_dim": 16,
            "v_head_dim": 12,
            "rope_parameters": _TWO_ROPES,
        },
    ),
    "afmoe": ("AfmoeConfig", {**_MIXED, **_EXPERTS, "head_dim": 16, "num_experts": 2, "num_dense_layers": 1}),
    "flint": ("FlintConfig", {**_MIXED, "head_dim": 16}),
    "mellum": (
        "MellumConfig",
        {**_MIXED, **_EXPERTS, "head_dim": 16, "num_experts": 2, "rope_parameters": _TWO_ROPES},
    ),
}

SMALL = FocusConfig(chunk_length=24, chunk_overlap=1, local_length=20, prompt_length=6, chunks_per_batch=2)


def build(
    family: str = "llama", attention: str = "sdpa", dtype: torch.dtype = torch.float32, **changes: Any
) -> nn.Module:
    """A tiny random model of a family."""
    name, extra = {**FAMILIES, **WINDOWED}[family]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**SIZES, **extra, **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):  # some begin with none
            nn.init.normal_(parameter)
    return model.to(dtype).eval().requires_grad_(False)


def with_candidates(model: nn.Module, config: AdapterConfig | None = None) -> nn.Module:
    """Inject candidate projections that differ clearly from the base's."""
    inject(model, config or AdapterConfig())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for wrapper in injected(model).values():
            for parameter in wrapper.own_parameters().values():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model


def random_ids(count: int, seed: int = 0, vocab: int = 250) -> list[int]:
    """Token ids without the special ones."""
    return torch.randint(3, vocab, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def byte_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """One token a byte, three control tokens, a small chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {name: i for i, name in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )
    if chat:
        fast.chat_template = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}<s>"
    return fast


def asked_about(llm: FocusLLM, documents: list[Document], question: str) -> Asked:
    """The first question of a conversation."""

    def no_turns(token_ids: list[int], start_ids: list[int]) -> list[ChunkBlock]:
        raise AssertionError("there are no earlier turns")

    return about(documents, llm.tokenizer, llm.config, [{"role": "user", "content": question}], no_turns)


@pytest.fixture
def llama() -> nn.Module:
    """A tiny Llama with candidate projections that differ from the base's."""
    return with_candidates(build())


@pytest.fixture
def tiny_llm() -> FocusLLM:
    """A tiny model with the byte tokenizer, as the library's front sees it."""
    model = FocusForCausalLM(with_candidates(build(max_position_embeddings=512)), SMALL.replace(local_length=64))
    return FocusLLM(model, byte_tokenizer(), "tiny")


@pytest.fixture
def llm() -> FocusLLM:
    """The same with 256 positions, for evaluation."""
    model = FocusForCausalLM(with_candidates(build()), SMALL.replace(local_length=64))
    return FocusLLM(model, byte_tokenizer(), "tiny")


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    """What evaluation tasks are made from: a tokenizer, a seed, folders, a text."""
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.txt").write_text("".join(f"Page {number}, line {i} of it. " for i in range(700)))
    return Setting(byte_tokenizer(), 0, tmp_path, str(folder))


@pytest.fixture
def model_folder(tmp_path: Path, tiny_llm: FocusLLM) -> Path:
    """A saved tiny model."""
    tiny_llm.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def focusllm(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Exit code, standard output and standard error of `focusllm ARGUMENTS`."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["focusllm", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        captured = capsys.readouterr()
        return int(left.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture(scope="session")
def embedded() -> FocusLLM:
    """The embedded model (fetched and converted once, into the user's cache)."""
    return FocusLLM.from_pretrained("smollm2-135m")


@pytest.fixture
def settings() -> Callable[..., FocusConfig]:
    """Small lengths, changed as needed."""
    return SMALL.replace


@pytest.fixture(scope="session")
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
def train_settings(base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., TrainConfig]:
    """Settings of a tiny training, changed as needed, with a cache of its own."""
    monkeypatch.setenv("FOCUSLLM_CACHE", str(tmp_path / "cache"))
    return lambda **changes: TrainConfig.from_dict({**tiny(base), **changes})
