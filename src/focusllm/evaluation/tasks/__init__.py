"""The tasks by name. A file in this folder is a family and has a tuple `TASKS`; a new file needs no other change."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Collection
from functools import cache

from focusllm.errors import ConfigError
from focusllm.evaluation.example import Task


@cache
def registry() -> dict[str, Task]:
    """All tasks."""
    modules = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    return {task.name: task for module in modules for task in module.TASKS}


def get(name: str) -> Task:
    """The task of that name.

    Raises:
        ConfigError: there is none; names the nearest.
    """
    if name not in registry():
        raise ConfigError(unknown("task", name, registry()))
    return registry()[name]


def expand(name: str) -> list[str]:
    """A task's name as it is, and a family's (`longbench`) as those of its tasks.

    Raises:
        ConfigError: neither.
    """
    family = [found for found in registry() if found.startswith(f"{name}-")]
    return [get(name).name] if name in registry() or not family else family


def unknown(kind: str, name: str, known: Collection[str]) -> str:
    """One sentence on a mistyped name."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    guess = f"did you mean {near[0]}? " if near else ""
    return f"there is no {kind} {name!r}; {guess}`focusllm eval list` shows what there is."
