"""Candidate projections: doing nothing by default, going away without a trace, files."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import peft
import pytest
import torch
from torch import nn

from conftest import build, random_ids, with_candidates
from focusllm import AdapterConfig, AdapterError, ConfigError, inject, load_adapter, remove, save_adapter
from focusllm.method.adapter import CandidateLinear, injected, trainable_parameters
from focusllm.method.focus import focus_logits

# peft reads a property that transformers has renamed
peft_warns = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

IDS = torch.tensor([random_ids(40)])
BOTH = [AdapterConfig(), AdapterConfig(rank=4, alpha=8)]


def own(model: nn.Module) -> dict[str, torch.Tensor]:
    return {f"{path}.{n}": p for path, w in injected(model).items() for n, p in w.own_parameters().items()}


@pytest.mark.parametrize("config", BOTH)
@pytest.mark.parametrize("family", ["llama", "llama-bias", "phi3"])
def test_removed_the_model_is_the_base(config: AdapterConfig, family: str) -> None:
    model = build(family)
    modules = dict(model.named_modules())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits = model(IDS).logits
    with_candidates(model, config)
    assert torch.equal(model(IDS).logits, logits)
    remove(model)
    assert dict(model.named_modules()) == modules
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(IDS).logits, logits)


@torch.no_grad()
def test_untrained_low_rank_changes_no_bit() -> None:
    model = build()
    chunks, prompt, local = [IDS[0, :24]], IDS[0, 24:30], IDS[0, 24:]
    bare = focus_logits(model, chunks, prompt, local)
    inject(model, AdapterConfig(rank=4))
    assert torch.equal(focus_logits(model, chunks, prompt, local), bare)


@pytest.mark.parametrize("config", BOTH)
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_any_projection_counts(config: AdapterConfig, family: str) -> None:
    """Each letter alone changes the candidates; on a fused projection only its own rows do."""
    seen = []
    for letter in "qkvo":
        model = with_candidates(build(family), AdapterConfig(letter, config.rank, config.alpha))
        seen.append(focus_logits(model, [IDS[0, :24]], IDS[0, 24:30], IDS[0, 24:]))
    bare = focus_logits(build(family), [IDS[0, :24]], IDS[0, 24:30], IDS[0, 24:])
    assert all(not torch.allclose(one, bare, atol=1e-5) for one in seen)
    assert all(not torch.allclose(a, b, atol=1e-5) for i, a in enumerate(seen) for b in seen[:i])


def test_fused_projection_leaves_the_other_rows() -> None:
    model = with_candidates(build("phi3"), AdapterConfig("k"))
    wrapper = injected(model)["model.layers.0.self_attn.qkv_proj"]
    assert wrapper.trainable_rows is not None
    assert wrapper.trainable_rows.tolist() == [False] * 64 + [True] * 32 + [False] * 32


@pytest.mark.parametrize("config", [*BOTH, AdapterConfig("kv", rank=2), AdapterConfig("qo")])
@pytest.mark.parametrize("family", ["llama", "llama-bias", "phi3"])
def test_saved_and_loaded(tmp_path: Path, config: AdapterConfig, family: str) -> None:
    model = with_candidates(build(family), config)
    save_adapter(model, tmp_path, config, "tiny/llama")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "focus_config.json",
    ]
    fresh = build(family)
    assert load_adapter(fresh, tmp_path) == config
    assert all(torch.equal(tensor, own(model)[name]) for name, tensor in own(fresh).items())
    card = (tmp_path / "README.md").read_text()
    assert "tiny/llama" in card
    assert "arXiv 2408.11745" in card


@peft_warns
def test_peft_loads_low_rank_projections(tmp_path: Path) -> None:
    """The same file as an ordinary LoRA: every token gets what a candidate gets."""
    config = AdapterConfig(rank=4, alpha=8)
    model = with_candidates(build(), config)
    save_adapter(model, tmp_path, config)
    loaded = peft.PeftModel.from_pretrained(build(), tmp_path).eval()
    wrapper = injected(model)["model.layers.1.self_attn.q_proj"]
    x = torch.randn(1, 3, 64)
    expected = wrapper.base(x) + 2.0 * x @ wrapper.lora_A.T @ wrapper.lora_B.T
    theirs = loaded.base_model.model.model.layers[1].self_attn.q_proj
    torch.testing.assert_close(theirs(x), expected, rtol=1e-5, atol=1e-5)


@peft_warns
def test_a_folder_that_peft_wrote(tmp_path: Path) -> None:
    lora = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(build(), lora)
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    model = build()
    config = load_adapter(model, tmp_path)
    assert (config.projections, config.rank, config.alpha) == ("qv", 3, 6)
    want = theirs.base_model.model.model.layers[2].self_attn.v_proj.lora_A["default"].weight
    assert torch.equal(injected(model)["model.layers.2.self_attn.v_proj"].lora_A, want)


@peft_warns
def test_rank_stabilised_lora_has_its_own_scale(tmp_path: Path) -> None:
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], use_rslora=True, init_lora_weights=False)
    theirs = peft.get_peft_model(build(), lora)
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    assert load_adapter(build(), tmp_path).scale == 4.0
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, "use_dora": True}))
    with pytest.raises(AdapterError, match="uses use_dora"):
        load_adapter(build(), tmp_path)


@pytest.mark.parametrize("change", [{"hidden_size": 32}, {"num_hidden_layers": 2}, {"num_key_value_heads": 4}])
def test_adapter_of_another_model(tmp_path: Path, change: dict[str, int]) -> None:
    save_adapter(with_candidates(build(**change)), tmp_path, AdapterConfig())
    model = build()
    with pytest.raises(AdapterError, match="belongs to another model"):
        load_adapter(model, tmp_path)
    assert injected(model) == {}


def test_damaged_weights_leave_the_present_adapter(tmp_path: Path) -> None:
    config = AdapterConfig(rank=4)
    model = with_candidates(build(), config)
    save_adapter(model, tmp_path, config)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    before = injected(model)
    with pytest.raises(AdapterError, match="is damaged"):
        load_adapter(model, tmp_path)
    assert injected(model) == before


@pytest.mark.parametrize(
    "content", ["{", "[]", "[" * 5000, "\ufeff{}", '{"adapter": {"projections": "xyz"}, "base": {}}', '{"base": {}}']
)
def test_damaged_settings(tmp_path: Path, content: str) -> None:
    (tmp_path / "focus_config.json").write_text(content)
    with pytest.raises(AdapterError, match="damaged"):
        load_adapter(build(), tmp_path)


def test_settings_that_another_system_wrote(tmp_path: Path) -> None:
    model = with_candidates(build())
    save_adapter(model, tmp_path, AdapterConfig())
    path = tmp_path / "focus_config.json"
    for encoding in ("utf-8-sig", "utf-16"):
        path.write_text(json.dumps(json.loads(path.read_bytes())), encoding=encoding)
        assert load_adapter(model, tmp_path) == AdapterConfig()


@pytest.mark.parametrize("mask", [0o077, 0o002])
def test_files_have_the_modes_that_the_user_wants(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        save_adapter(with_candidates(build()), tmp_path / "adapter", AdapterConfig())
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "adapter").stat().st_mode) == 0o777 & ~mask
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "adapter").iterdir()} == {0o666 & ~mask}


def test_names_that_cannot_be_files() -> None:
    with pytest.raises(AdapterError, match="there is no adapter folder aaa"):
        load_adapter(build(), "a" * 300)
    with pytest.raises(AdapterError, match=r"there is no adapter folder a\\nb\\x00c; give"):
        load_adapter(build(), "a\nb\0c")


def test_missing_pieces(tmp_path: Path) -> None:
    model = build()
    with pytest.raises(AdapterError, match="there is no adapter folder"):
        load_adapter(model, tmp_path / "nowhere")
    with pytest.raises(AdapterError, match="is not an adapter"):
        load_adapter(model, tmp_path)
    save_adapter(with_candidates(model), tmp_path, AdapterConfig())
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"has no adapter_model\.safetensors"):
        load_adapter(model, tmp_path)


def test_weights_of_another_rank(tmp_path: Path) -> None:
    save_adapter(with_candidates(build(), AdapterConfig(rank=4)), tmp_path, AdapterConfig(rank=4))
    settings = json.loads((tmp_path / "focus_config.json").read_text())
    settings["adapter"]["rank"] = 8
    (tmp_path / "focus_config.json").write_text(json.dumps(settings))
    with pytest.raises(AdapterError, match="does not fit the model"):
        load_adapter(build(), tmp_path)


@peft_warns
def test_lora_on_something_else(tmp_path: Path) -> None:
    peft.get_peft_model(build(), peft.LoraConfig(target_modules=["up_proj"])).save_pretrained(
        tmp_path, save_embedding_layers=False
    )
    with pytest.raises(AdapterError, match="not LoRA on attention projections"):
        load_adapter(build(), tmp_path)


def test_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no candidate projections to save"):
        save_adapter(build(), tmp_path, AdapterConfig())


def test_an_interrupted_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = AdapterConfig(rank=4)
    model = with_candidates(build(), config)
    save_adapter(model, tmp_path, config)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("focusllm.huggingface.adapter_files.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(model, tmp_path, config)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"projections": "qx"}, "letters"),
        ({"projections": ""}, "letters"),
        ({"rank": 0}, "rank is 0"),
        ({"rank": 8.0}, "rank is 8.0"),
        ({"alpha": "32"}, "alpha is '32'"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"sink_token": -1}, "sink_token is -1"),
        ({"sink_token": "1"}, "sink_token is '1'"),
    ],
)
def test_bad_adapter_settings(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AdapterConfig(**arguments)


def test_injecting_again_replaces() -> None:
    model = with_candidates(build())
    inject(model, AdapterConfig("k", rank=2))
    assert all(not isinstance(wrapper.base, CandidateLinear) for wrapper in injected(model).values())
    assert len(injected(model)) == 3
    assert len(trainable_parameters(model)) == 6


def test_pull_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name with an owner goes to the hub; here the hub's answer is a folder in its format."""
    save_adapter(with_candidates(build()), tmp_path, AdapterConfig())
    asked: list[str] = []

    def snapshot(name: str, **_: object) -> str:
        asked.append(name)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert load_adapter(build(), "owner/adapter") == AdapterConfig()
    assert asked == ["owner/adapter"]


def test_push_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, object]] = []
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda self, *a, **k: calls.append(("create", a[0])))
    monkeypatch.setattr(
        "huggingface_hub.HfApi.upload_folder", lambda self, **k: calls.append(("upload", k["folder_path"])) or "address"
    )
    from focusllm import push_adapter

    assert push_adapter(tmp_path, "owner/adapter") == "address"
    assert calls == [("create", "owner/adapter"), ("upload", tmp_path)]
