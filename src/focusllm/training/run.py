"""A training from settings to an adapter: model, corpora, samples, loop, plots, model card.

OUTPUT/config.json      the settings
OUTPUT/log.jsonl        a line a step and a line an evaluation; OUTPUT/tensorboard the same for TensorBoard
OUTPUT/checkpoints/     to go on from
OUTPUT/adapter/         the best checkpoint's candidate projections, with a model card
OUTPUT/loss.png         the curves
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from filelock import FileLock, Timeout
from transformers import AutoModelForCausalLM, AutoTokenizer

from focusllm.documents.text import first_token
from focusllm.errors import ConfigError, DocumentError, TrainingError
from focusllm.files import whole_file, whole_folder
from focusllm.huggingface.adapter_files import load_tensors, save_adapter
from focusllm.huggingface.embedded import cache_folder, public_name, resolve_model
from focusllm.huggingface.loading import cannot_load, computing_dtype, parse_dtype
from focusllm.method.base import layout
from focusllm.training import checkpoint
from focusllm.training.checkpoint import disk_errors
from focusllm.training.config import Source, TrainConfig
from focusllm.training.corpus import check_source, load_corpus
from focusllm.training.loop import Report, Training, read_log
from focusllm.training.report import card_tables, plot_losses
from focusllm.training.sampling import Sampler, check_positions


def train(
    config: TrainConfig,
    output: str | Path,
    *,
    report: Report = lambda _: None,
    reading: Callable[[str, int], None] = lambda *_: None,
    notify: Callable[[str], None] = lambda _: None,
) -> Path:
    """Train candidate projections; goes on where an earlier training with the same settings in this folder stopped.

    Args:
        config: what to train, on what, and how.
        output: a folder for everything that the training writes.
        report: called with a dictionary for every step (`loss`, `objectives`, ...) and every evaluation.
        reading: called with (source, tokens so far) while a source is tokenised.
        notify: called with a sentence about what is worth knowing.

    Returns:
        The folder of the finished adapter.

    Raises:
        TrainingError: a folder that is in use or holds another training, a loss that is not finite, a full disk.
        DocumentError, ConfigError, ModelError, AdapterError: data, settings, model or adapter that cannot work.
        KeyboardInterrupt: after Ctrl-C, with the step under way saved.
    """
    output = Path(output)
    if not config.sources:
        raise ConfigError("there are no sources; name at least one folder, file or dataset to train on.")
    _check_places(config, output)
    with _launched_sharded() as sharded:
        return _locked(config.replace(sharded=True) if sharded else config, output, report, reading, notify)


def _locked(
    config: TrainConfig,
    output: Path,
    report: Report,
    reading: Callable[[str, int], None],
    notify: Callable[[str], None],
) -> Path:
    accelerator = _accelerator()
    with disk_errors(output):
        output.mkdir(parents=True, exist_ok=True)
        lock = FileLock(output / ".lock")
        try:
            if accelerator.is_main_process:
                lock.acquire(timeout=0)
        except Timeout as error:
            raise TrainingError(f"another training is writing into {output}; use another folder, or wait.") from error
    try:
        return _train(config, output, accelerator, report, reading, notify)
    except OSError as error:  # the log, the plots, TensorBoard's files
        raise TrainingError(
            f"{output} cannot be written ({error.strerror or error}); the checkpoints in it are untouched. Make room "
            f"and run the same command again to go on."
        ) from error
    finally:
        lock.release()


@contextmanager
def _launched_sharded() -> Iterator[bool]:
    """Whether `accelerate launch --use_fsdp` was asked for.

    Meanwhile nobody else sees that: accelerate would do it in its own way (on CPUs not at all), and transformers would
    load the weights in the first process only, for accelerate to hand on.
    """
    name = "ACCELERATE_USE_FSDP"
    asked = os.environ.get(name, "false")
    os.environ[name] = "false"
    try:
        yield asked.lower() == "true"
    finally:
        os.environ[name] = asked


def _accelerator() -> Accelerator:
    # Our own types and our own accumulation, whatever the user's accelerate configuration says.
    return Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="no",
        gradient_accumulation_steps=1,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=6))],  # one process tokenises for all
    )


def _check_places(config: TrainConfig, output: Path) -> None:
    """Look for what can be known before anything is loaded.

    Raises:
        DocumentError: a file or folder that is not there.
        ConfigError: a source with the output or with held-out text in it; without any, sources with text in common.
    """
    for source in (*config.sources, *config.held_out):
        check_source(source)
    for number, source in enumerate(config.sources):
        place = Path(source.path).resolve()
        if not source.path.startswith("hf:") and output.resolve().is_relative_to(place):
            raise ConfigError(f"the output folder {output} lies in the source {source.path}; choose one outside.")
        for kept in config.held_out:
            if _have_text_in_common(source, kept):
                raise ConfigError(f"{kept.path} is held out, but {source.path} has it too; keep them apart.")
        for other in () if config.held_out else config.sources[:number]:
            if _have_text_in_common(source, other) and _place(source) != _place(other):  # the same is split alike
                raise ConfigError(
                    f"the sources {other.path} and {source.path} have text in common, so that what is kept from one of "
                    f"them to evaluate on is trained on from the other; keep them apart, or name held_out."
                )


def _place(source: Source) -> tuple[Any, ...]:
    """Where a source is: the same for two that are split alike."""
    if source.path.startswith("hf:"):
        return source.path, source.split, source.subset
    return (Path(source.path).resolve(),)


def _have_text_in_common(one: Source, other: Source) -> bool:
    """Whether one has the other in it, as far as their names tell."""
    (first, *_), (second, *_) = _place(one), _place(other)
    if isinstance(first, Path) and isinstance(second, Path):
        return first.is_relative_to(second) or second.is_relative_to(first)
    return _place(one) == _place(other)


def _train(
    config: TrainConfig,
    output: Path,
    accelerator: Accelerator,
    report: Report,
    reading: Callable[[str, int], None],
    notify: Callable[[str], None],
) -> Path:
    training = _assembled(config, output, accelerator, reading, notify)
    if training.step:
        notify(f"Going on after step {training.step} of {config.steps}.")
    board = _Board(output, training.step) if accelerator.is_main_process else None

    def both(entry: dict[str, Any]) -> None:
        if board is not None:
            board.add(entry)
        report(entry)

    if accelerator.is_main_process:
        with whole_file(output / "config.json") as temporary:
            temporary.write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    training.run(both)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _finish(training, output, notify)
    accelerator.wait_for_everyone()
    return output / "adapter"


def _assembled(
    config: TrainConfig,
    output: Path,
    accelerator: Accelerator,
    reading: Callable[[str, int], None],
    notify: Callable[[str], None],
) -> Training:
    tokenizer, model = load_base(config.model, config.dtype, accelerator.device, notify)
    check_positions(config, layout(model).max_positions)
    folder = cache_folder() / "corpora"
    with accelerator.main_process_first():  # the main process tokenises, the others find it done
        trained = [(load_corpus(source, tokenizer, folder, reading), source.weight) for source in config.sources]
        kept = [(load_corpus(source, tokenizer, folder, reading), source.weight) for source in config.held_out]
    if not kept:
        parts = [(*corpus.split(), weight) for corpus, weight in trained]
        trained = [(first, weight) for first, _, weight in parts]
        kept = [(second, weight) for _, second, weight in parts]
    sampler = Sampler(config, tokenizer, trained)
    held_out = None
    try:
        held_out = Sampler(config, tokenizer, kept, "held out")
    except DocumentError:
        if config.held_out:
            raise
        notify("No text is left over to evaluate on (held_out names some); the last checkpoint is taken as the best.")
    sink = first_token(tokenizer) if config.sink else None
    return Training(config, model, sampler, held_out, output, public_name(config.model), accelerator, sink, notify)


def load_base(
    name: str, dtype: str, device: torch.device, notify: Callable[[str], None] = lambda _: None
) -> tuple[Any, Any]:
    """Tokenizer and model (still in main memory), as it is trained beside on a device.

    Raises:
        ModelError: a missing folder, a damaged file, an unknown type, a proxy that refuses, ...
    """
    path = resolve_model(name, notify)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        return tokenizer, AutoModelForCausalLM.from_pretrained(path, dtype=_dtype(dtype, device)).eval()
    except Exception as error:
        raise cannot_load(name, error) from error


def _dtype(name: str, device: torch.device) -> torch.dtype:
    """auto: bfloat16 where it is fast, else float32."""
    asked = parse_dtype(name)
    return asked if isinstance(asked, torch.dtype) else computing_dtype(torch.bfloat16, device)


def _finish(training: Training, output: Path, notify: Callable[[str], None]) -> None:
    """The adapter of the best checkpoint, with its card, and the plots."""
    found, _ = checkpoint.newest(output)
    assert found is not None
    best = checkpoint.name_of(training.best["step"]) if training.best else found.name
    chosen = next((path for path in checkpoint.all_of(output) if path.name == best), found)
    if reason := checkpoint.fault(chosen):
        notify(f"The best checkpoint {chosen} is damaged ({reason}); the newest one is taken instead.")
        chosen = found
    log, steps = read_log(output / "log.jsonl"), checkpoint.step_of(chosen)
    config = training.config
    adapter_config = training.adapter_config.replace(
        trained={
            "steps": steps,
            "supervised_tokens": sum(entry["labels"] for entry in log if "loss" in entry and entry["step"] <= steps),
            "chunk_lengths": list(config.chunk_lengths),
            "local_lengths": list(config.local_lengths),
            "prompt_lengths": list(config.prompt_lengths),
        }
    )
    notes, tensors = card_tables(config, log, chosen.name), load_tensors(chosen)
    with disk_errors(output / "adapter"), whole_folder(output / "adapter") as part:
        save_adapter(training.base, part, adapter_config, training.base_name, notes, tensors)
    plot_losses(log, output / "loss.png")


class _Board:
    """TensorBoard's event files, where the package is installed."""

    def __init__(self, output: Path, step: int):
        self.writer: Any = None
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            with suppress(UnicodeEncodeError):  # it knows no folders whose names are not in UTF-8
                self.writer = SummaryWriter(str(output / "tensorboard"), purge_step=step + 1)

    def add(self, entry: dict[str, Any]) -> None:
        """One log entry as scalars."""
        if self.writer is None:
            return
        for part, values in (("train", entry), ("held out", entry.get("evaluation", {}))):
            for name in ("loss", "learning_rate", "gradient_norm"):
                if name in values:
                    self.writer.add_scalar(f"{part}/{name}", values[name], entry["step"])
            for objective, found in values.get("objectives", {}).items():
                self.writer.add_scalar(f"{part}/{objective}", found["loss"], entry["step"])
        self.writer.flush()
