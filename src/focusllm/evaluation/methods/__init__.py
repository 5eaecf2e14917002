"""The methods by name. A file in this folder is a method and has a class `METHOD`; a new file needs no other change."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

from focusllm.errors import ConfigError
from focusllm.options import parse_setting, unknown

if TYPE_CHECKING:
    from focusllm.evaluation.method import Method
    from focusllm.llm import FocusLLM
    from focusllm.memory.chunk_cache import LastText

NAMES = tuple(sorted(found.name for found in pkgutil.iter_modules(__path__)))


def parse(spec: str) -> tuple[str, dict[str, Any]]:
    """`name` or `name:option=value,...` as a name and its options.

    Raises:
        ConfigError: an unknown method, or an option without a value.
    """
    name, _, rest = spec.partition(":")
    if name not in NAMES:
        raise ConfigError(unknown("method", name, NAMES))
    return name, dict(parse_setting(part) for part in rest.split(",") if part)


def build(spec: str, llm: FocusLLM, chunks: LastText | None = None) -> Method:
    """The method of a spec, on a model.

    Args:
        chunks: encoded ones, which methods share; None: the method's own.

    Raises:
        ConfigError: an unknown method or option, or a package that is not installed.
    """
    name, options = parse(spec)
    method: type[Method] = importlib.import_module(f"{__name__}.{name}").METHOD
    odd = sorted(set(options) - set(method.defaults))
    if odd:
        known = ", ".join(method.defaults) or "none"
        raise ConfigError(f"{name} has no option {', '.join(odd)}; its options are: {known}.")
    return method(llm, chunks=chunks, **options)
