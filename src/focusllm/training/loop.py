"""The training loop: one for a CPU, a GPU, and several processes.

    for step in steps:
        memories = sampler.draw(step, 0 .. memories_per_step - 1), shared out among the processes
        to be distilled: what the teacher says to them
        encode chunks (frozen, no graph) -> dense_loss -> gradients of the candidate projections -> AdamW
        every now and then: evaluate on held-out text, write a checkpoint

The base model is frozen and may be in a 16-bit type; the candidate projections are float32. Several processes hold a
copy of the model each, or share one (`sharded`); then all of them run the same passes, some of which count for nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from multiprocessing import resource_tracker
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.utils.data import DataLoader, Dataset

from focusllm.errors import TrainingError
from focusllm.files import whole_file
from focusllm.huggingface.adapter_files import adapter_tensors, load_adapter, save_adapter
from focusllm.json_text import parse_json
from focusllm.method.adapter import AdapterConfig, inject, injected, trainable_parameters
from focusllm.training import checkpoint
from focusllm.training.config import TrainConfig
from focusllm.training.loss import MemoryLoss, Meter
from focusllm.training.sampling import Memory, Sampler
from focusllm.training.sharding import gathered, shard, whole
from focusllm.training.teacher import Teacher

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
MAY_CHANGE = (
    "evaluate_every",
    "evaluation_memories",
    "save_every",
    "keep_last",
    "sharded",
    "labels_per_pass",
    "loaders",
)
Report = Callable[[dict[str, Any]], None]


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of a step (counted from 0): warm-up, then the schedule down to its final share."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    least = config.final_learning_rate
    share = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[config.schedule]
    return config.learning_rate * (share if config.schedule == "constant" else least + (1 - least) * share)


class Training:
    """A training in a folder.

    Args:
        config: what to train and how.
        model: the base model; candidate projections are injected.
        sampler, held_out: where memories come from; held_out None: no evaluation.
        output: the folder for checkpoints, logs and the adapter.
        base_name: the base model's name, for the adapter's card.
        sink_token: the token in front of the candidates (`config.sink` says whether there shall be one).
        notify: called with a sentence about what is worth knowing.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        sampler: Sampler,
        held_out: Sampler | None,
        output: Path,
        base_name: str = "",
        accelerator: Accelerator | None = None,
        sink_token: int | None = None,
        notify: Callable[[str], None] = lambda _: None,
    ):
        self.config, self.sampler, self.held_out, self.output = config, sampler, held_out, Path(output)
        self.base_name = base_name
        self.accelerator = accelerator or Accelerator(cpu=not torch.cuda.is_available())
        if config.memories_per_step % self.accelerator.num_processes:
            raise TrainingError(
                f"memories_per_step is {config.memories_per_step}, which cannot be shared out evenly among "
                f"{self.accelerator.num_processes} processes; use a multiple."
            )
        self.adapter_config = AdapterConfig(config.projections, config.rank, config.alpha, sink_token)
        self.step, self.saved = 0, -1
        self.best: dict[str, Any] = {}
        self.base = model
        if self.accelerator.is_main_process:
            checkpoint.clear(self.output)
        self.accelerator.wait_for_everyone()
        found, damaged = checkpoint.newest(self.output)
        self.accelerator.wait_for_everyone()  # all have looked
        if self.accelerator.is_main_process:
            for folder, reason in damaged.items():
                checkpoint.set_aside(folder)
                notify(f"The checkpoint {folder} is damaged ({reason}); it is set aside, and the one before is used.")
        self._place(found)

    def _place(self, resumed: Path | None) -> None:
        """Inject the projections, from a checkpoint if there is one, and make the optimizer."""
        model, config = self.base, self.config
        torch.manual_seed(config.seed)
        source = resumed or config.init_adapter
        if source:
            loaded = load_adapter(model, source, torch.float32)
            asked = self.adapter_config
            theirs, ours = (
                (", ".join(sorted(set(found.projections))), found.rank, found.scale) for found in (loaded, asked)
            )
            if theirs != ours:
                kind = "{} of rank {} and scale {:g}".format
                raise TrainingError(
                    f"the projections in {source} are {kind(*theirs)}, not {kind(*ours)}; use the settings that they "
                    f"were trained with."
                )
            for wrapper in injected(model).values():  # what it goes on with, not what it began with
                wrapper.config = asked
        else:
            inject(model, self.adapter_config, torch.float32)
        model.requires_grad_(False)
        for parameter in trainable_parameters(model).values():
            parameter.requires_grad_(True)
        self.loss = MemoryLoss(model, config)
        self.sharded = config.sharded and self.accelerator.num_processes > 1
        prepare = self.accelerator.prepare
        self.module = shard(self.loss, model, self.accelerator.device) if self.sharded else prepare(self.loss)
        trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            trained, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=config.weight_decay
        )
        if resumed:
            self._restore(resumed)
        self.teacher = None
        if config.objective == "distill":
            folder = self.output / "teacher" / self._known_by() if config.kept_memories else None
            self.teacher = Teacher(model, self.sampler.tokenizer, config, folder)

    def _restore(self, folder: Path) -> None:
        state, optimizer = checkpoint.load(folder)
        # Settings that are newer than the training have their defaults, which are how it was before them.
        before, now = _plain(TrainConfig()) | state["config"], _plain(self.config)
        may_change = set(MAY_CHANGE)
        if self.config.refresh_rows:  # samples that are worked on together see each other's chunks
            may_change.remove("labels_per_pass")
        if "dtype" in state:  # the type itself is compared
            may_change.add("dtype")
        odd = [name for name in now if name not in may_change and before.get(name) != now[name]]
        if odd:
            raise TrainingError(
                f"the training in {self.output} has other settings ({odd[0]} is {before.get(odd[0])}, now "
                f"{now[odd[0]]}); use the same ones to go on, or another output folder to begin anew."
            )
        if state["data"] != self.sampler.data:
            raise TrainingError(
                f"the text of the training in {self.output} has changed ([source, documents, tokens] were "
                f"{state['data']}, now {self.sampler.data}); put it back to go on, or use another output folder."
            )
        for name, here in self._surroundings().items():
            if state.get(name, here) != here:
                remedy = f"set dtype to {state[name]}" if name == "dtype" else "put it back"
                raise TrainingError(
                    f"the training in {self.output} was made with another {name} ({state[name]}, now {here}); {remedy} "
                    f"to go on, or use another output folder to begin anew."
                )
        set_optimizer_state_dict(self.module, self.optimizer, optimizer, options=WHOLE)
        self.step = self.saved = state["step"]
        is_other = before["evaluation_memories"] != now["evaluation_memories"]  # whose losses are not compared
        self.best = {} if is_other and self.step < self.config.steps else state["best"]

    def _surroundings(self) -> dict[str, str]:
        """What the numbers depend on beside settings and corpora."""
        dtype = str(next(self.base.parameters()).dtype).removeprefix("torch.")
        samplers = [sampler for sampler in (self.sampler, self.held_out) if sampler is not None]
        return {
            "dtype": dtype,
            "content of stories and multihop": " ".join(s.questions for s in samplers).strip(),
            "content of the sources": " ".join(s.content for s in samplers),
        }

    def _known_by(self) -> str:
        """Changes when anything does that the memories, or what is said to them, may depend on."""
        settings = {name: value for name, value in _plain(self.config).items() if name not in MAY_CHANGE}
        said = json.dumps([settings, self.sampler.data, self._surroundings()], sort_keys=True)
        return hashlib.sha256(said.encode()).hexdigest()[:16]

    def _taught(self, memory: Memory) -> Memory:
        return memory if self.teacher is None else self.teacher.taught(memory)

    def run(self, report: Report = lambda _: None) -> dict[str, Any]:
        """Train until the last step.

        Args:
            report: called with a dictionary for every step and every evaluation.

        Returns:
            The last evaluation, or the last step if there was none.

        Raises:
            TrainingError: a loss that is not finite, a full disk; says what is saved.
            KeyboardInterrupt: after Ctrl-C, when the step under way is done and saved.
        """
        self._cut_log()
        last: dict[str, Any] = {}
        with _interrupts() as interrupted:
            if self.step == 0:
                last = self._evaluate(report, first=True) or last
            start = time.perf_counter()
            for memories in self._drawn():
                entry = self._advance(memories, start)
                self._log(entry, report)
                done = self.step == self.config.steps
                if done or self.step % self.config.evaluate_every == 0:
                    last = self._evaluate(report) or entry
                stop = self._anywhere(interrupted.is_set())
                if done or stop or self.step % self.config.save_every == 0:
                    self.save()
                if stop and not done:
                    raise KeyboardInterrupt
                start = time.perf_counter()
        return last

    def _drawn(self) -> Iterator[list[Memory]]:
        """The memories of every step that is still to do, those of this process."""
        accelerator, loaders = self.accelerator, self.config.loaders
        mine = range(accelerator.process_index, self.config.memories_per_step, accelerator.num_processes)
        loader: DataLoader[list[Memory]] = DataLoader(
            _Steps(self.sampler, mine),
            batch_size=None,
            sampler=range(self.step, self.config.steps),
            num_workers=loaders,
            collate_fn=_as_drawn,
            worker_init_fn=_obedient,
            multiprocessing_context="spawn" if loaders else None,  # a fork would share threads and the GPU
        )
        with _signals_blocked() if loaders else nullcontext():
            return iter(loader)

    def _advance(self, memories: list[Memory], start: float) -> dict[str, Any]:
        """One optimiser step, which began with the drawing of its memories."""
        config, accelerator = self.config, self.accelerator
        memories = [self._taught(memory) for memory in memories]
        passes = self._agreed([self.loss.num_passes(memory.samples) for memory in memories])
        labels = sum(size for memory in memories for _, size in self._sizes(memory))
        total = int(accelerator.reduce(torch.tensor(labels, device=accelerator.device), "sum"))
        rate = learning_rate(config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        meter = Meter()
        for i, memory in enumerate(memories):
            last = i == len(memories) - 1
            with nullcontext() if last else accelerator.no_sync(self.module):
                losses, hits = self.module(memory, passes[i])
                # Gradients are averaged over processes, so the mean over all labels needs their number back.
                loss = losses.sum() * (accelerator.num_processes / total)
                if not torch.isfinite(loss):
                    raise self._not_finite("loss", float(loss.detach()), memory)
                accelerator.backward(loss)
            meter.add(self._sizes(memory), losses, hits)
        norm = accelerator.clip_grad_norm_(
            [parameter for parameter in self.module.parameters() if parameter.requires_grad], config.clip
        )
        norm = None if norm is None else whole(norm)
        if norm is not None and not torch.isfinite(norm):
            raise self._not_finite("gradient", float(norm), memories[-1])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        seconds = time.perf_counter() - start
        return {
            "step": self.step,
            **meter.gathered(accelerator).result(),
            "learning_rate": rate,
            "gradient_norm": float(norm if norm is not None else 0.0),
            "seconds": seconds,
        }

    def _anywhere(self, here: bool) -> bool:
        """Whether something is so in any process: all of them save, or none."""
        if self.accelerator.num_processes == 1:
            return here
        return int(self.accelerator.reduce(torch.tensor(int(here), device=self.accelerator.device), "sum")) > 0

    def _agreed(self, passes: list[int]) -> list[int]:
        """How many passes each memory gets: sharded, as many as any process needs for its one."""
        if not self.sharded:
            return passes
        everywhere: Tensor = self.accelerator.gather(torch.tensor([passes], device=self.accelerator.device))
        return everywhere.amax(0).tolist()

    def _sizes(self, memory: Memory) -> list[tuple[str, int]]:
        sizes = self.loss.sizes(memory.samples)
        return [(sample.objective, size) for sample, size in zip(memory.samples, sizes, strict=True)]

    def _not_finite(self, what: str, value: float, memory: Memory) -> TrainingError:
        found = checkpoint.all_of(self.output)
        saved = f"the last good checkpoint is {found[-1]}" if found else "there is no checkpoint yet"
        return TrainingError(
            f"the {what} is {value} in step {self.step} (a memory from {memory.origin}); {saved}. Use a smaller "
            f"learning_rate (it is {self.config.learning_rate}) or float32."
        )

    @torch.no_grad()
    def _evaluate(self, report: Report, first: bool = False) -> dict[str, Any] | None:
        """Losses on held-out text; at first, also without memory."""
        if self.held_out is None:
            return None
        accelerator, meter, alone = self.accelerator, Meter(), Meter()
        meters = [(meter, False), (alone, True)] if first else [(meter, False)]
        count, together = self.config.evaluation_memories, accelerator.num_processes
        for start in range(0, count, together):  # a process without a memory in the last round takes one for nothing
            number = start + accelerator.process_index
            memory = self._taught(self.held_out.draw(0, number))
            for total, without_memory in meters:
                (passes,) = self._agreed([self.loss.num_passes(memory.samples, without_memory)])
                found = self.module(memory, passes, without_memory)
                if number < count:
                    total.add(self._sizes(memory), *found)
        entry: dict[str, Any] = {"step": self.step, "evaluation": meter.gathered(accelerator).result()}
        if first:
            entry["without_memory"] = alone.gathered(accelerator).result()
        loss = entry["evaluation"]["loss"]
        if not first and loss < self.best.get("loss", math.inf):
            self.best = {"loss": loss, "step": self.step}
            self._log(entry, report)  # before it is saved: what is logged too much is cut, what is not is lost
            self.save()
        else:
            self._log(entry, report)
        return entry

    def save(self) -> None:
        """Write a checkpoint, unless this step has one (all processes take part, the main one writes)."""
        if self.saved == self.step:
            return
        self.saved = self.step
        optimizer = get_optimizer_state_dict(self.module, self.optimizer, options=WHOLE)
        tensors = gathered(adapter_tensors(self.base), keep=self.accelerator.is_main_process)
        state = {"config": self.config.to_dict(), "data": self.sampler.data, "best": self.best, **self._surroundings()}
        if self.accelerator.is_main_process:

            def write(folder: Path) -> None:
                save_adapter(self.base, folder, self.adapter_config, self.base_name, tensors=tensors)

            checkpoint.save(self.output, self.step, state, optimizer, write)
            best = checkpoint.name_of(self.best["step"]) if self.best else None
            checkpoint.prune(self.output, self.config.keep_last, best)
        self.accelerator.wait_for_everyone()

    def _log(self, entry: dict[str, Any], report: Report) -> None:
        if self.accelerator.is_main_process:
            path = self.output / "log.jsonl"
            with checkpoint.disk_errors(path), path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
            report(entry)

    def _cut_log(self) -> None:
        """Remove from the log what was done after the checkpoint and will be done again."""
        path = self.output / "log.jsonl"
        if self.accelerator.is_main_process and path.exists():
            kept = [entry for entry in read_log(path) if entry["step"] <= self.step and self.step]
            with checkpoint.disk_errors(path), whole_file(path) as temporary:
                temporary.write_text("".join(f"{json.dumps(entry)}\n" for entry in kept), encoding="utf-8")


class _Steps(Dataset[list[Memory]]):
    """The memories of a step, by the step's number."""

    def __init__(self, sampler: Sampler, numbers: range):
        self.sampler, self.numbers = sampler, numbers

    def __getitem__(self, step: int) -> list[Memory]:
        return [self.sampler.draw(step, number) for number in self.numbers]


def _as_drawn(memories: list[Memory]) -> list[Memory]:
    return memories


def _obedient(number: int) -> None:
    """Signals are for the training alone, which saves and then ends its loaders."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _plain(config: TrainConfig) -> dict[str, Any]:
    """Settings as a checkpoint gives them back: lists for tuples."""
    found: dict[str, Any] = json.loads(json.dumps(config.to_dict()))
    return found


def read_log(path: Path) -> list[dict[str, Any]]:
    """The entries of a log; a last line that was cut off by a kill is left out."""
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):
            entries.append(parse_json(line))
    return entries


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """For processes that are started meanwhile, which inherit it until they are obedient."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # it would unblock them when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Ctrl-C sets an event, so that the step under way is finished and saved; a second one stops at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, old in before.items():
            signal.signal(number, old)
