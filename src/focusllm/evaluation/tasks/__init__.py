"""The tasks by name. A file in this folder is a family and has a tuple `TASKS`; a new file needs no other change."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from focusllm.errors import ConfigError
from focusllm.evaluation.example import Task
from focusllm.options import unknown


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
    """A task's name as it is, and a family's (`longbench`, `ruler-niah`; of two tasks at least) as those of its tasks.

    Raises:
        ConfigError: neither.
    """
    family = [found for found in registry() if found.startswith((f"{name}-", f"{name}_"))]
    return [get(name).name] if name in registry() or len(family) < 2 else family
