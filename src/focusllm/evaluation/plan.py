"""What a run measures: tasks, methods and lengths, checked before anything heavy is loaded. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from focusllm.errors import ConfigError
from focusllm.evaluation import methods, tasks
from focusllm.evaluation.example import Example, LengthError, Setting, Task


@dataclass(frozen=True)
class Cell:
    """A task by a method at a length (None: the task's own lengths)."""

    task: str
    length: int | None
    method: str


@dataclass(frozen=True)
class Plan:
    """A selection: every task by every method at every length.

    Args:
        tasks: names, or those of families (`longbench`), which stand for their tasks.
        methods: names, or `name:option=value,...` (see `methods.parse`).
        limit: examples of a task at a length.
        seed, data, text, hub: as `Setting` takes them.

    Raises:
        ConfigError: an unknown task or method, nothing selected, or lengths that are none.
    """

    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    lengths: tuple[int, ...] = ()
    limit: int = 100
    seed: int = 0
    data: str | None = None
    text: str | None = None
    hub: bool = False

    def __post_init__(self) -> None:
        for kind, names in (("task", self.tasks), ("method", self.methods)):
            if not names:
                raise ConfigError(f"no {kind} is selected; `focusllm eval list` shows what there is.")
        for method in self.methods:
            methods.parse(method)
        object.__setattr__(self, "tasks", tuple(found for name in self.tasks for found in tasks.expand(name)))
        selected = [tasks.get(name) for name in self.tasks]
        if min(self.lengths, default=1) < 1 or self.limit < 1:
            raise ConfigError(f"lengths are {self.lengths} and the limit is {self.limit}; they must be at least 1.")
        without = [task.name for task in selected if not task.has_own_lengths]
        if without and not self.lengths:
            raise ConfigError(f"no lengths are given for {', '.join(without)}; name some, as in --lengths 4096,8192.")

    @property
    def cells(self) -> list[Cell]:
        """What is measured, in this order."""
        return [
            Cell(name, length, method)
            for name in dict.fromkeys(self.tasks)
            for length in ((None,) if self.task(name).has_own_lengths else sorted(set(self.lengths)))
            for method in dict.fromkeys(self.methods)
        ]

    def task(self, name: str) -> Task:
        """A task by its name."""
        return tasks.get(name)

    def setting(self, tokenizer: Any) -> Setting:
        """What the tasks may draw on."""
        data = Path(self.data) if self.data else None
        return Setting(tokenizer, self.seed, data, self.text, self.hub, self.lengths)

    def check_examples(self, setting: Setting) -> None:
        """Make and score every task's first example at every length, so that missing files and packages show at once.

        Raises:
            ConfigError, DocumentError: by the task; or it has no examples; or nothing can be made at these lengths.
        """
        some, impossible = False, None
        for name, length in dict.fromkeys((cell.task, cell.length) for cell in self.cells):
            made: Iterator[Any] = iter(self.task(name).examples(length, 1, setting))
            try:
                example = next(made, None)
            except LengthError as error:
                setting.warn(f"left out: {error}")
                impossible = error
                continue
            if example is None:
                raise ConfigError(f"{name} has no examples{f' at {length} tokens' if length else ''}; leave it out.")
            if isinstance(example, Example):
                self.task(name).score("a prediction", example)
            some = True
        if impossible is not None and not some:
            raise impossible

    def to_dict(self) -> dict[str, Any]:
        """All fields and the tasks' versions, as JSON gives them back."""
        versions = {name: self.task(name).version for name in self.tasks}
        lists = {name: list(getattr(self, name)) for name in ("tasks", "methods", "lengths")}
        return {**asdict(self), **lists, "task_versions": versions}
