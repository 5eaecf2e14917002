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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

from focusllm.adapter import load_adapter, save_adapter
from focusllm.embedded import cache_folder, resolve_model
from focusllm.errors import ConfigError, ModelError, TrainingError, first_line
from focusllm.modeling import computing_dtype, parse_dtype
from focusllm.training import checkpoint
from focusllm.training.config import TrainConfig
from focusllm.training.corpus import load_corpus
from focusllm.training.loop import Report, Training
from focusllm.training.report import card_tables, plot_losses
from focusllm.training.sampling import Sampler


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
    from filelock import FileLock, Timeout

    output = Path(output)
    if not config.sources:
        raise ConfigError("there are no sources; name at least one folder, file or dataset to train on.")
    try:
        output.mkdir(parents=True, exist_ok=True)
        accelerator = Accelerator(cpu=not torch.cuda.is_available())
        lock = FileLock(output / ".lock")
        if accelerator.is_main_process:
            lock.acquire(timeout=0)
    except Timeout as error:
        raise TrainingError(f"another training is writing into {output}; use another folder, or wait.") from error
    except OSError as error:
        raise TrainingError(f"{output} cannot be written ({error.strerror or error}); name another folder.") from error
    try:
        return _train(config, output, accelerator, report, reading, notify)
    finally:
        lock.release()


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
    board = _Board(output) if accelerator.is_main_process else None

    def both(entry: dict[str, Any]) -> None:
        if board is not None:
            board.add(entry)
        report(entry)

    if accelerator.is_main_process:
        checkpoint.write_file(output / "config.json", json.dumps(config.to_dict(), indent=2) + "\n")
    training.run(both)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _finish(training, output)
    accelerator.wait_for_everyone()
    return output / "adapter"


def _assembled(
    config: TrainConfig,
    output: Path,
    accelerator: Accelerator,
    reading: Callable[[str, int], None],
    notify: Callable[[str], None],
) -> Training:
    path = resolve_model(config.model, notify)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=_dtype(config.dtype, accelerator.device)).eval()
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"the model {config.model} cannot be loaded: {first_line(error)}") from error
    folder = cache_folder() / "corpora"
    with accelerator.main_process_first():  # the main process tokenises, the others find it done
        trained = [(load_corpus(source, tokenizer, folder, reading), source.weight) for source in config.sources]
        kept = [(load_corpus(source, tokenizer, folder, reading), source.weight) for source in config.held_out]
    if not kept:
        parts = [(*corpus.split(), weight) for corpus, weight in trained]
        trained = [(first, weight) for first, _, weight in parts]
        kept = [(second, weight) for _, second, weight in parts]
    sampler = Sampler(config, tokenizer, trained)
    held_out = Sampler.or_none(config, tokenizer, kept)
    if held_out is None:
        notify("No text is left over to evaluate on (held_out names some); the last checkpoint is taken as the best.")
    return Training(config, model, sampler, held_out, output, config.model, accelerator)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    """auto: bfloat16 where it is fast, else float32."""
    asked = parse_dtype(name)
    return asked if isinstance(asked, torch.dtype) else computing_dtype(torch.bfloat16, device)


def _finish(training: Training, output: Path) -> None:
    """The adapter of the best checkpoint, with its card, and the plots."""
    best = training.best.get("step")
    folders = {path.name: path for path in checkpoint.all_of(output)}
    chosen = folders.get(f"step-{best:06d}" if best is not None else "", list(folders.values())[-1])
    log = [json.loads(line) for line in (output / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    model, config = training.base, training.config
    adapter_config = training.adapter_config.replace(
        trained={
            "steps": int(chosen.name.removeprefix("step-")),
            "supervised_tokens": sum(entry.get("labels", 0) for entry in log),
            "chunk_lengths": list(config.chunk_lengths),
            "local_lengths": list(config.local_lengths),
            "prompt_lengths": list(config.prompt_lengths),
        }
    )
    load_adapter(model, chosen)
    notes = card_tables(config, log, chosen.name)
    checkpoint.write_whole(
        output / "adapter",
        lambda part: save_adapter(model, part, adapter_config, config.model, notes=notes),
    )
    plot_losses(log, output / "loss.png")


class _Board:
    """TensorBoard's event files, where the package is installed."""

    def __init__(self, output: Path):
        self.writer: Any = None
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(output / "tensorboard"))

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
