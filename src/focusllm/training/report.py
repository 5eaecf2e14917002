"""What a training leaves to look at: curves as PNG, and the tables of the adapter's card."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

from focusllm.errors import shown
from focusllm.training.config import TrainConfig


def plot_losses(log: list[dict[str, Any]], path: Path) -> bool:
    """Draw the losses by objective against the supervised tokens seen; False: matplotlib is not installed.

    Lines are the training's own losses, a running mean; dots are evaluations on held-out text; dashed lines are what
    the local context alone gives.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    steps = [entry for entry in log if "loss" in entry]
    seen = dict(zip([e["step"] for e in steps], accumulate(e["labels"] for e in steps), strict=True)) | {0: 0}
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    names = sorted({name for entry in steps for name in entry["objectives"]})
    for number, name in enumerate(names):
        color = f"C{number}"
        points = [(seen[e["step"]], e["objectives"][name]) for e in steps if name in e["objectives"]]
        axes.plot(
            [x for x, _ in points], _smooth([found["loss"] for _, found in points]), color=color, lw=1, label=name
        )
        dots = [(seen[e["step"]], e["evaluation"]["objectives"].get(name)) for e in log if "evaluation" in e]
        dots = [(x, found["loss"]) for x, found in dots if found]
        axes.plot([x for x, _ in dots], [y for _, y in dots], "o", color=color, ms=4)
        for entry in log:
            alone = entry.get("without_memory", {}).get("objectives", {}).get(name)
            if alone:
                axes.axhline(alone["loss"], color=color, ls="--", lw=0.8, alpha=0.6)
    axes.set(xlabel="supervised tokens", ylabel="nats a token", title="Loss (dots: held out; dashed: without memory)")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)
    return True


def card_tables(config: TrainConfig, log: list[dict[str, Any]], chosen: str) -> str:
    """Data, settings and results of a training, as Markdown."""
    step = int(chosen.removeprefix("step-"))
    sources = "\n".join(f"| `{shown(source.path)}` | {source.weight:g} |" for source in config.sources)
    shares = sum(config.objectives.values())
    mixture = ", ".join(f"{name} {share / shares:.0%}" for name, share in config.objectives.items())
    kind = f"low rank {config.rank}" if config.is_low_rank else "full copies"
    settings = {
        "projections": f"{config.projections}, {kind}",
        "objectives": mixture,
        "supervision": config.supervision,
        "steps": f"{step} of {config.steps}",
        "supervised tokens": f"{sum(e['labels'] for e in log if 'loss' in e and e['step'] <= step):,}",
        "chunk, memory, local, prompt lengths": "; ".join(
            ", ".join(map(str, lengths))
            for lengths in (config.chunk_lengths, config.memory_lengths, config.local_lengths, config.prompt_lengths)
        ),
        "memories a step, samples a memory, answer length": f"{config.memories_per_step}, "
        f"{config.samples_per_memory}, {config.answer_length}",
        "learning rate": f"{config.learning_rate:g}, {config.schedule}, {config.warmup_steps} steps of warm-up",
        "seed": config.seed,
    }
    text = f"\n## Training\n\n| source | weight |\n|---|---|\n{sources}\n\n| setting | |\n|---|---|\n"
    text += "".join(f"| {name} | {value} |\n" for name, value in settings.items())
    evaluations = [entry for entry in log if "evaluation" in entry]
    at_best = next((entry for entry in evaluations if entry["step"] == step), None)
    if at_best is not None:
        alone = evaluations[0].get("without_memory", {}).get("objectives", {})
        text += "\n## Measured on held-out text during training\n\n"
        text += "| objective | nats a token | tokens right | without memory |\n|---|---|---|---|\n"
        for name, found in at_best["evaluation"]["objectives"].items():
            without = f"{alone[name]['loss']:.2f}" if name in alone else ""
            text += f"| {name} | {found['loss']:.2f} | {found['accuracy']:.0%} | {without} |\n"
    return text


def _smooth(values: list[float], share: float = 0.9) -> list[float]:
    """A running mean that starts unbiased."""
    result, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = share * mean + (1 - share) * value, share * weight + (1 - share)
        result.append(mean / weight)
    return result
