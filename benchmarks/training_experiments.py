"""What training learns at equal cost: one short training a variant, from nothing, on the same samples.

    python benchmarks/training_experiments.py --data DATA --held-out DATA/books/test --seconds 400

Every variant trains for the same processor time (with OMP_WAIT_POLICY=PASSIVE other work does not count), on samples of
examples/presets/laptop.toml, and is then evaluated on the same held-out memories. Finished variants are kept in the
result file and left out when the program is run again; `--only NAME ...` takes some of them.

The distilled variants spend their time on the teacher's passes too. All variants are measured twice: by the true tokens
of the preset's samples (`held_out`), and by what the teacher says to distilled ones (`taught`): the divergence from it,
and how many of its answers' tokens are the likeliest ones.

Three variants change the method itself:

    recurrent   a row grows by its candidates alone: each sees the chunk, the prompt and the sample's earlier
                candidates, instead of the ordinary answer tokens (which then need not be read)
    sink        the local pass begins with the base model's first token, in front of the candidates
    two         two candidates a chunk: the newest token twice, the second sees the first; two slots a chunk
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import earlier, finish
from focusllm.huggingface.embedded import cache_folder, resolve_model
from focusllm.huggingface.loading import computing_dtype
from focusllm.method.adapter import AdapterConfig, inject, trainable_parameters
from focusllm.method.base import run
from focusllm.method.focus import Over, encode_chunks, mover
from focusllm.method.kv import KV, Segment
from focusllm.training.config import TrainConfig
from focusllm.training.corpus import load_corpus
from focusllm.training.dense import Places, Sample, answer_losses, local_logits, ordinary_pass, packs_of
from focusllm.training.loop import learning_rate
from focusllm.training.loss import Meter
from focusllm.training.sampling import Memory, Sampler
from focusllm.training.teacher import Teacher

PRESET = Path(__file__).parent.parent / "examples" / "presets" / "laptop.toml"
QUESTIONS = {"facts": 0.2, "tables": 0.2}
SHORT = {"answer_length": 48}
DISTILLED = {"objective": "distill", "teacher_lengths": (256, 512), **SHORT}
LONG_LOCAL = {"local_lengths": (512,), "samples_per_memory": 4}

Settings = dict[str, Any]
VARIANTS: dict[str, tuple[Settings, str]] = {
    "baseline": ({}, ""),
    "full copies, rate 2e-4": ({"rank": 0, "learning_rate": 2e-4}, ""),
    "full copies, rate 6e-4": ({"rank": 0, "learning_rate": 6e-4}, ""),
    "rank 8": ({"rank": 8}, ""),
    "rank 32": ({"rank": 32}, ""),
    "rank 128": ({"rank": 128}, ""),
    "rate 1e-3": ({"learning_rate": 1e-3}, ""),
    "rate 4e-3": ({"learning_rate": 4e-3}, ""),
    "q, v": ({"projections": "qv"}, ""),
    "k, v": ({"projections": "kv"}, ""),
    "q, k, v": ({"projections": "qkv"}, ""),
    "recurrent": ({}, "recurrent"),
    "sink": ({}, "sink"),
    "two": ({}, "two"),
    "repetition 0%": ({"objectives": {"continuation": 0.6, **QUESTIONS}}, ""),
    "repetition 25%": ({"objectives": {"repetition": 0.25, "continuation": 0.35, **QUESTIONS}}, ""),
    "repetition 100%": ({"objectives": {"repetition": 1.0}}, ""),
    "both objectives alone": ({"objectives": {"repetition": 0.5, "continuation": 0.5}}, ""),
    "continuation alone": ({"objectives": {"continuation": 1.0}}, ""),
    "labels, 48 tokens": (SHORT, ""),
    "distilled": (DISTILLED, ""),
    "distilled, kept": ({**DISTILLED, "kept_memories": 8}, ""),
    "distilled, top 8": ({**DISTILLED, "top_k": 8}, ""),
    "distilled, all tokens": ({**DISTILLED, "top_k": 0}, ""),
    "distilled, temperature 2": ({**DISTILLED, "temperature": 2.0}, ""),
    "distilled, answers drawn": ({**DISTILLED, "answer_temperature": 0.7}, ""),
    "distilled, repetition 50%": (
        {**DISTILLED, "objectives": {"repetition": 0.5, "continuation": 0.2, "facts": 0.15, "tables": 0.15}},
        "",
    ),
    "local 512, prompt 16": ({**LONG_LOCAL, "prompt_lengths": (16,)}, ""),
    "local 512, prompt 64": ({**LONG_LOCAL, "prompt_lengths": (64,)}, ""),
    "local 512, prompt 512": ({**LONG_LOCAL, "prompt_lengths": (512,)}, ""),
}
"""Changes to the preset, and to the method."""


class RecurrentPlaces(Places):
    """As `Places`, but candidates stand in their rows in place of the ordinary answer tokens."""

    def __init__(self, samples: Sequence[Sample], chunk_length: int, device: torch.device):
        super().__init__(samples, chunk_length, device)
        prompts = torch.tensor([sample.newest - sample.start for sample in samples], device=device)
        kept = self.row_positions < chunk_length + prompts[self.of_row]
        self.row_tokens, self.row_positions = self.row_tokens[kept], self.row_positions[kept]
        self.row_mask, self.candidate_mask = self.row_mask[kept][:, kept], self.candidate_mask[:, kept]
        at = self.candidate_positions
        self.own_mask = (self.of_candidate[:, None] == self.of_candidate) & (at[:, None] >= at)


def candidates_of(model: nn.Module, chunk_kv: KV, ordinary: KV, places: Places, width: int, first_slot: int) -> KV:
    """As `dense.candidate_sets`, `width` candidates a chunk and moment: [R * width, K, N, D] a layer, in slot order."""
    rows, device = chunk_kv.num_rows, places.candidate_tokens.device
    segments = [Segment([chunk_kv])]
    if ordinary.length:
        segments.append(Segment([ordinary], places.candidate_mask.repeat_interleave(width, 0)))
    extra = torch.arange(width, device=device)
    same = places.own_mask.repeat_interleave(width, 0).repeat_interleave(width, 1)
    earlier = extra[:, None] >= extra
    own = same & earlier.repeat(len(places.own_mask), len(places.own_mask)) if width > 1 else same
    attention = Over(segments, own_mask=own)
    tokens = places.candidate_tokens.repeat_interleave(width)
    positions = (places.candidate_positions[:, None] + extra).flatten()[None]
    run(model, tokens.expand(rows, -1), positions, attention, candidates=slice(0, len(tokens)))
    slots = first_slot + width * torch.arange(rows, device=device)[:, None] + extra.repeat(len(places.own_mask))
    move = mover(model, slots - positions)
    moved = KV([move(i, key) for i, key in enumerate(attention.kv.keys)], attention.kv.values)
    return moved.map(lambda made: made.unflatten(2, (-1, width)).permute(0, 3, 1, 2, 4).flatten(0, 1))


def losses_of(model: nn.Module, memory: Memory, method: str) -> tuple[list[Sample], Tensor, Tensor]:
    """The samples in the order worked on, and the losses and hits of all their labels."""
    kv = encode_chunks(model, torch.as_tensor(memory.chunks, dtype=torch.long))
    first = encode_chunks(model, torch.ones(1, 1, dtype=torch.long)) if method == "sink" else None
    in_order, logits = [], []
    for pack in packs_of(memory.samples):
        samples = [memory.samples[i] for i in pack]
        make = RecurrentPlaces if method == "recurrent" else Places
        places = make(samples, kv.length, torch.device("cpu"))
        with torch.no_grad():
            ordinary = ordinary_pass(model, kv, places)
        width = 2 if method == "two" else 1
        sets = candidates_of(model, kv, ordinary, places, width, int(first is not None))
        logits.append(local_logits(model, sets, places, torch.arange(sets.num_rows), sets.num_rows, first))
        in_order += samples
    return in_order, *answer_losses(torch.cat(logits), in_order)


def train_variant(config: TrainConfig, method: str, bench: Bench, seconds: float) -> dict[str, Any]:
    """One training of so many seconds of processor time, and its evaluation."""
    torch.manual_seed(config.seed)
    model = bench.model()
    inject(model, AdapterConfig(config.projections, config.rank, config.alpha), torch.float32)
    model.requires_grad_(False)
    trained = list(trainable_parameters(model).values())
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=config.weight_decay)
    memory_of = bench.memories_of(model, config, "train")
    used, step, curve = 0.0, 0, []
    while used < seconds:
        start = time.process_time()
        memory, meter = memory_of(step, 0), Meter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        samples, losses, hits = losses_of(model, memory, method)
        losses.mean().backward()
        nn.utils.clip_grad_norm_(trained, config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        meter.add([(sample.objective, sample.num_answers) for sample in samples], losses, hits)
        used, step = used + time.process_time() - start, step + 1
        curve.append({"seconds": used, **meter.result()})
        print(f"\r  step {step}, {used:.0f} of {seconds:.0f} s, {curve[-1]['loss']:.2f}", end="", flush=True)
    return {
        "steps": step,
        "labels": sum(point["labels"] for point in curve),
        "seconds": used,
        "parameters": sum(parameter.numel() for parameter in trained),
        "held_out": evaluate(model, bench, method, config, {}),
        "taught": evaluate(model, bench, method, config, DISTILLED),
        "curve": curve,
    }


@torch.no_grad()
def evaluate(model: nn.Module, bench: Bench, method: str, config: TrainConfig, settings: Settings) -> dict[str, Any]:
    """Losses by objective on the preset's held-out samples, but with the variant's own lengths and these settings."""
    lengths = {name: getattr(config, name) for name in ("local_lengths", "prompt_lengths")}
    asked = bench.preset.replace(**lengths, **settings, samples_per_memory=8)
    memory_of, meter = bench.memories_of(model, asked, "held out"), Meter()
    for number in range(bench.memories):
        samples, losses, hits = losses_of(model, memory_of(0, number), method)
        meter.add([(sample.objective, sample.num_answers) for sample in samples], losses, hits)
    return meter.result()


class Bench:
    """What all variants share."""

    def __init__(self, arguments: argparse.Namespace):
        self.path = resolve_model("smollm2-135m", print)
        self.tokenizer = AutoTokenizer.from_pretrained(self.path)
        self.dtype = computing_dtype(torch.bfloat16, torch.device("cpu"))
        places = {"sources": [str(Path(arguments.data))], "held_out": [str(Path(arguments.held_out))]}
        self.preset = TrainConfig.from_file(PRESET, **places)
        self.memories = arguments.memories
        folder = cache_folder() / "corpora"
        load: Callable[[Any], Any] = lambda source: load_corpus(source, self.tokenizer, folder, lambda *_: None)  # noqa: E731
        self.corpora = {
            "train": [(load(source), source.weight) for source in self.preset.sources],
            "held out": [(load(source), source.weight) for source in self.preset.held_out],
        }

    def model(self) -> nn.Module:
        """The base model, untouched."""
        return AutoModelForCausalLM.from_pretrained(self.path, dtype=self.dtype).eval()

    def memories_of(self, model: nn.Module, config: TrainConfig, part: str) -> Callable[[int, int], Memory]:
        """The memories of a part of the data by step and number; to be distilled, with what the teacher says."""
        sampler = Sampler(config, self.tokenizer, self.corpora[part], part)
        if config.objective == "labels":
            return sampler.draw
        folder = None
        if config.kept_memories:
            self.kept = tempfile.TemporaryDirectory()  # gone with the program
            folder = Path(self.kept.name)
        teacher = Teacher(model, self.tokenizer, config, folder)
        return lambda step, number: teacher.taught(sampler.draw(step, number))


def main() -> None:
    """Train and evaluate every variant that has no result yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of texts to train on")
    parser.add_argument("--held-out", required=True, help="folder of texts to evaluate on")
    parser.add_argument("--seconds", type=float, default=400, help="processor time of a training")
    parser.add_argument("--memories", type=int, default=6, help="held-out memories, 8 samples each")
    parser.add_argument("--threads", type=int, default=1, help="one: two programs beside each other waste nothing")
    parser.add_argument("--result", default="training_experiments", help="name of the result file")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    bench = Bench(arguments)
    for name in arguments.only:
        if name in done(arguments.result):
            continue
        settings, method = VARIANTS[name]
        result = train_variant(bench.preset.replace(**settings), method, bench, arguments.seconds)
        results = {
            **done(arguments.result),
            name: result,
        }  # read anew: another one of these programs may have added some
        finish(
            arguments.result,
            {"seconds": arguments.seconds, "memories": bench.memories, "variants": results},
            quiet=True,
        )
        print(f"\r{name}: {summary(results[name])}")
    print(f"\n{'':24s}steps  labels  " + "  ".join(f"{name[:12]:>12s}" for name in OBJECTIVES))
    for name, row in done(arguments.result).items():
        print(f"{name:24s}{row['steps']:5d}  {row['labels']:6d}  {summary(row)}")


def done(result: str) -> dict[str, Any]:
    """The results so far, by variant."""
    return dict(earlier(result).get("variants", {}))


OBJECTIVES = ("repetition", "continuation", "facts", "tables")


def summary(row: dict[str, Any]) -> str:
    """Held-out losses, nats a label."""
    found = row["held_out"]["objectives"]
    return "  ".join(f"{found[name]['loss']:12.3f}" for name in OBJECTIVES if name in found)


if __name__ == "__main__":
    main()
