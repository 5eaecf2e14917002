"""What a training is: every setting, checked once, to and from a TOML file. No torch here."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from focusllm.config import is_whole
from focusllm.errors import ConfigError
from focusllm.files import open_text

Schedule = Literal["cosine", "linear", "constant"]
Supervision = Literal["dense", "exact"]
Objective = Literal["labels", "distill"]
LENGTHS = ("chunk_lengths", "memory_lengths", "local_lengths", "prompt_lengths", "teacher_lengths")
TEXT_OBJECTIVES = ("continuation", "repetition")
LABELS_PER_PASS = 192
"""What is best on a CPU."""
QUESTION_FILES = ("stories", "multihop", "questions")
"""The objectives whose tasks are read from files, which settings of the same names list."""
TASK_OBJECTIVES = ("facts", "tables", *QUESTION_FILES)


@dataclass(frozen=True)
class Source:
    """Where text comes from.

    Raises:
        ConfigError: a weight that is not positive, a path that is no text.
    """

    path: str
    """A folder or file of text, a JSONL file, or a Hugging Face dataset as `hf:owner/name`, or a JSONL file in it as
    `hf:owner/name/folder/file.jsonl`, or in a zip archive of it as `hf:owner/name/files.zip/folder/file.jsonl`."""
    weight: float = 1.0
    """How often it is drawn from, relative to the other sources."""
    column: str = "text"
    """The column with the text; `messages`, or `prompt` and `completion`, are found by themselves."""
    split: str = "train"
    """The split of a dataset."""
    subset: str | None = None
    """The subset (configuration) of a dataset."""

    def __post_init__(self) -> None:
        for name in ("path", "column", "split"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"the {name} of a source is {getattr(self, name)!r}; it must be a text.")
        if not isinstance(self.weight, int | float) or not 0 < self.weight < math.inf:
            raise ConfigError(f"the weight of {self.path} is {self.weight!r}; it must be a number above 0.")


@dataclass(frozen=True)
class TrainConfig:
    """A training. All lengths are in tokens; of several lengths, each memory draws one.

    Raises:
        ConfigError: with the setting, its value and what it may be.
    """

    sources: tuple[Source, ...] = ()
    held_out: tuple[Source, ...] = ()
    """What the loss is evaluated on during training. Empty: one document in fifty of every source, which is then not
    trained on; if there are fewer than fifty, the end of each, and nothing of prompts with an answer."""
    model: str = "smollm2-135m"
    dtype: str = "auto"
    """Type of the frozen base model; trainable weights are float32. auto: bfloat16 where it is fast, else float32."""

    # The trainable projections.
    projections: str = "qkvo"
    rank: int | None = 64
    """Rank of low-rank projections; 0 in a file, None here: full copies, as in the paper."""
    alpha: float | None = None
    sink: bool = False
    """Put the tokenizer's first token (where it has none, its last) in front of the candidates in the local pass: an
    attention sink, which the base model is used to. The adapter then always comes with it. false: candidates stand
    first, as in the paper. Learns sooner; whether it is better in the end is open (see docs/log.md)."""
    init_adapter: str | None = None
    """Begin from these projections instead of untrained ones."""

    # What a sample is.
    supervision: Supervision = "dense"
    """dense: every answer token is a label; exact: the first one only, the paper's loss (slow)."""
    objectives: dict[str, float] = field(default_factory=lambda: {"continuation": 0.5, "repetition": 0.5})
    """Share of the samples of each objective: continuation, repetition, facts, tables, stories, multihop, questions."""
    stories: tuple[str, ...] = ()
    """bAbI files for the objective `stories`."""
    multihop: tuple[str, ...] = ()
    """HotpotQA or MuSiQue files for the objective `multihop`."""
    questions: tuple[str, ...] = ()
    """Files of `focusllm questions` for the objective `questions`."""
    chunk_lengths: tuple[int, ...] = (128, 256, 512, 1024)
    memory_lengths: tuple[int, ...] = (1024, 2048, 4096)
    local_lengths: tuple[int, ...] = (64, 128, 256)
    prompt_lengths: tuple[int, ...] = (16, 32, 64)
    noise: float = 0.0
    """Share of the tokens of a repetition that are read as other ones than they are (in half of them, by chance), while
    labels stay right: teaches to go on in the right place behind a wrong token."""
    local_facts: float = 0.0
    """Share of the tasks whose facts stand in the local context instead of the memory, if they fit into half of the
    longest one, which such samples have. Without any, projections that are trained long enough look for answers in the
    memory alone."""
    answer_length: int = 64
    """Supervised tokens of a continuation or repetition; the most of an answer that the data gives."""
    samples_per_memory: int = 6
    """Samples that share one encoded memory."""
    labels_per_pass: int = LABELS_PER_PASS
    """Samples of a memory with at most so many labels go through the model together. More are faster on a GPU and take
    more memory; on a CPU this many are best."""
    memories_per_step: int = 1
    """Memories of one optimiser step, over all processes."""
    refresh_rows: int | None = None
    """Chunks of a memory whose candidates a sample sees: those with the answer, and others by chance up to this number.
    The rest are neither seen nor read, as with focused refresh. Samples that are worked on together see each other's.
    0 in a file, None here: all. Dense supervision only, and not sharded."""
    distractors: tuple[int, ...] = (0,)
    """Chunks of other documents around a memory's own, beside `memory_lengths`: each memory draws a number of them.
    Those from its own document are left out. Not for documents with an answer."""
    distractor_pool: int = 128
    """How many different distractors of a chunk length there are. The keys and values of so many are kept in memory."""

    # What is learned from them.
    objective: Objective = "labels"
    """labels: the right tokens. distill: what the base model itself says when it has the right passage in its window
    (the teacher); repetitions and documents with an answer stay with their right tokens."""
    teacher_lengths: tuple[int, ...] = (512, 1024)
    """Tokens of text in the teacher's window, the passage among them; continuations have the longest one."""
    answer_temperature: float = 0.0
    """At which the teacher draws its answers to questions; 0: the likeliest ones."""
    temperature: float = 1.0
    """At which teacher and student are compared."""
    top_k: int | None = 64
    """How many of the teacher's likeliest tokens are told apart at an answer position. 0 in a file, None here: all."""
    kept_memories: int = 0
    """So many different memories are trained on, again and again, and what the teacher says to them is kept beside the
    checkpoints. 0: every memory is a new one, and nothing is kept."""

    # The optimiser.
    steps: int = 1000
    learning_rate: float = 4e-3
    """The highest rate. The default is for low-rank projections, which learn sooner by it than by half of it (see
    docs/log.md); full copies want a lower one."""
    warmup_steps: int = 20
    schedule: Schedule = "cosine"
    final_learning_rate: float = 0.1
    """Where the schedule ends, as a share of the learning rate."""
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0
    loaders: int = 0
    """Processes that draw samples ahead of time, in each training process; for GPUs, which would wait for them. 0: they
    are drawn when they are needed. The samples are the same. A script that trains with them needs the usual
    `if __name__ == "__main__"`, for they import it."""
    checkpointed: bool = False
    """Recompute the passes for the gradients instead of keeping activations: less memory, a third more time."""
    sharded: bool = False
    """Split the model up among the processes (FSDP) instead of giving each a copy: less memory, more communication. A
    launch by `accelerate launch --use_fsdp` does the same. One process has nothing to split."""

    # What is kept.
    evaluate_every: int = 100
    evaluation_memories: int = 8
    save_every: int = 50
    keep_last: int = 2

    def __post_init__(self) -> None:
        self._check_types()
        self._check_numbers()
        self._check_refreshed()
        self._check_teacher()
        self._check_objectives()
        if max(self.chunk_lengths) > max(self.memory_lengths):
            raise ConfigError(
                f"chunk_lengths go up to {max(self.chunk_lengths)}, but memory_lengths only to "
                f"{max(self.memory_lengths)}; a memory holds at least one chunk."
            )
        if not self.projections or set(self.projections) - set("qkvo"):
            raise ConfigError(f"projections is {self.projections!r}; it must be one or more of the letters q, k, v, o.")
        if self.supervision not in ("dense", "exact"):
            raise ConfigError(f"supervision is {self.supervision!r}; it must be dense or exact.")
        if self.schedule not in ("cosine", "linear", "constant"):
            raise ConfigError(f"schedule is {self.schedule!r}; it must be cosine, linear or constant.")

    def _check_types(self) -> None:
        kinds = {"objectives": dict, "rank": int | None, "refresh_rows": int | None, "projections": str, "model": str}
        for name, kind in (kinds | {"checkpointed": bool, "sharded": bool, "sink": bool}).items():
            if not isinstance(getattr(self, name), kind):
                raise ConfigError(f"{name} is {getattr(self, name)!r}, which is of the wrong type.")
        for name in (
            "learning_rate",
            "final_learning_rate",
            "weight_decay",
            "clip",
            "noise",
            "local_facts",
            "temperature",
            "answer_temperature",
            *self.objectives,
        ):
            value = self.objectives.get(name, getattr(self, name, None))
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise ConfigError(f"{name} is {value!r}; it must be a finite number.")

    def _check_numbers(self) -> None:
        for name in LENGTHS:
            lengths = getattr(self, name)
            if not lengths or any(not isinstance(length, int) or length < 1 for length in lengths):
                raise ConfigError(f"{name} is {lengths!r}; give one or more whole numbers of at least 1.")
        for name in ("answer_length", "samples_per_memory", "memories_per_step", "steps", "evaluate_every"):
            self._at_least(name, 1)
        for name in ("evaluation_memories", "save_every", "keep_last", "distractor_pool", "labels_per_pass"):
            self._at_least(name, 1)
        for name in ("warmup_steps", "seed", "loaders", "kept_memories"):
            self._at_least(name, 0)
        for name in ("noise", "local_facts"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 0 and below 1.")
        if not self.learning_rate > 0 or not self.clip > 0 or min(self.weight_decay, self.final_learning_rate) < 0:
            raise ConfigError(
                "learning_rate and clip must be above 0, weight_decay and final_learning_rate at least 0."
            )
        if self.seed >= 2**63:
            raise ConfigError(f"seed is {self.seed}; it must be below 2**63.")

    def _check_refreshed(self) -> None:
        rows, counts = self.refresh_rows, self.distractors
        if rows is not None and (isinstance(rows, bool) or rows < 1):
            raise ConfigError(f"refresh_rows is {rows!r}; it must be a whole number of at least 1, or 0 for all.")
        if rows is not None and (self.sharded or self.supervision == "exact"):
            other = "sharded = true" if self.sharded else 'supervision = "exact"'
            raise ConfigError(
                f"refresh_rows is {rows} with {other}, which reads all chunks for every label; leave it out."
            )
        if not counts or any(type(x) is not int or not 0 <= x <= self.distractor_pool for x in counts):
            raise ConfigError(
                f"distractors is {counts!r}; give one or more whole numbers from 0 to distractor_pool, which is "
                f"{self.distractor_pool}."
            )

    def _check_teacher(self) -> None:
        if self.objective not in ("labels", "distill"):
            raise ConfigError(f"objective is {self.objective!r}; it must be labels or distill.")
        if not self.temperature > 0 or self.answer_temperature < 0:
            raise ConfigError("temperature must be above 0, answer_temperature at least 0.")
        if self.top_k is not None and not is_whole(self.top_k, 1):
            raise ConfigError(f"top_k is {self.top_k!r}; it must be a whole number of at least 1, or 0 for all tokens.")
        if self.objective == "labels":
            return
        if self.sharded or self.supervision == "exact":
            other = "sharded = true" if self.sharded else 'supervision = "exact"'
            raise ConfigError(f'objective is "distill" with {other}, which has no teacher; leave one of them out.')
        if self.kept_memories and self.top_k is None:
            raise ConfigError(
                f"kept_memories is {self.kept_memories} with top_k = 0, which would keep a number for every token of "
                f"the vocabulary at every answer position; set top_k."
            )

    def _check_objectives(self) -> None:
        known = (*TEXT_OBJECTIVES, *TASK_OBJECTIVES)
        odd = sorted(set(self.objectives) - set(known))
        if odd:
            raise ConfigError(f"objectives has {', '.join(odd)}; known are {', '.join(known)}.")
        shares = list(self.objectives.values())
        if not shares or min(shares) < 0 or sum(shares) <= 0:
            raise ConfigError(f"objectives is {self.objectives}; give shares of at least 0 that are not all 0.")
        for name in QUESTION_FILES:
            if self.objectives.get(name) and not getattr(self, name):
                raise ConfigError(f"objectives asks for {name}, but {name} names no files; name some or leave it out.")

    def _at_least(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if not is_whole(value, least):
            raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least {least}.")

    @property
    def is_low_rank(self) -> bool:
        """Whether base + low rank is trained rather than full copies."""
        return self.rank is not None

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> TrainConfig:
        """Settings from what a TOML or JSON file holds.

        Raises:
            ConfigError: unknown settings, or values that cannot work.
        """
        names = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(content) - names)
        if unknown:
            raise ConfigError(f"unknown setting {', '.join(unknown)}; known settings are: {', '.join(sorted(names))}.")
        settings: dict[str, Any] = dict(content)
        for name in ("sources", "held_out", *QUESTION_FILES, "distractors", *LENGTHS):
            if name in settings:  # one alone may stand without a list
                given = settings[name]
                settings[name] = tuple(given) if isinstance(given, list | tuple) else (given,)
        try:
            for name in ("sources", "held_out"):
                if name in settings:
                    settings[name] = tuple(
                        Source(source) if isinstance(source, str) else Source(**source) for source in settings[name]
                    )
        except TypeError as error:
            raise ConfigError(f"a source is wrong ({error}); it has path, weight, column, split and subset.") from error
        for name in ("rank", "refresh_rows", "top_k"):
            if settings.get(name) == 0 and settings[name] is not False:
                settings[name] = None
        return cls(**settings)

    @classmethod
    def from_file(cls, path: str | Path, **changes: Any) -> TrainConfig:
        """Settings from a TOML file, some of them changed.

        Raises:
            ConfigError: no such file, or one that is not TOML; as `from_dict`.
        """
        try:
            with open_text(path) as file:
                content = tomllib.loads(file.read())
        except RecursionError as error:
            raise ConfigError(f"the settings {path} are nested too deeply; give a TOML file of settings.") from error
        except OSError as error:
            reason = error.strerror or error
            raise ConfigError(f"the settings {path} cannot be read ({reason}); give a TOML file.") from error
        except ValueError as error:
            raise ConfigError(f"the settings {path} cannot be read ({error}); give a TOML file.") from error
        return cls.from_dict({**content, **changes})

    def to_dict(self) -> dict[str, Any]:
        """All settings, as JSON takes them."""
        zeros = {name: getattr(self, name) or 0 for name in ("rank", "refresh_rows", "top_k")}
        return {**dataclasses.asdict(self), **zeros}

    def replace(self, **changes: Any) -> TrainConfig:
        """A copy with some settings changed, checked again."""
        return TrainConfig.from_dict({**self.to_dict(), **changes})
