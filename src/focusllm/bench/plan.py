"""What is to be measured: contenders, lengths, limits, the text. Numbers and names only: no torch, no model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from focusllm.config import Weights, parse_weights
from focusllm.errors import ConfigError
from focusllm.options import parse_setting, unknown

Kind = Literal["focus", "full", "llama.cpp"]

CONTENDERS: dict[str, tuple[Kind, dict[str, Any]]] = {
    "focus": ("focus", {}),
    "exact": ("focus", {"decoding": "exact"}),
    "full": ("full", {}),
    "llama.cpp": ("llama.cpp", {}),
}
"""The contenders that have a name of their own: what they are, and what sets them apart."""

MOST_MINUTES = 7 * 24 * 60
"""A week: longer than anyone waits, shorter than what systems can wait for."""
LENGTHS = (4096, 8192, 16384, 32768)


@dataclass(frozen=True)
class Spec:
    """One contender: its name, what it is, and (of `focus`) the fields of its `FocusConfig`."""

    name: str
    kind: Kind
    settings: dict[str, Any] = field(default_factory=dict)
    gguf: Path | None = None
    """The model as llama.cpp reads it; None: the embedded model's own file."""

    @property
    def is_quadratic(self) -> bool:
        """Whether reading takes a*n + b*n^2: every token attends to all before it."""
        return self.kind != "focus"


@dataclass(frozen=True)
class Plan:
    """One run of the benchmark. Lengths are tokens of the document; the question comes on top.

    Raises:
        ConfigError: a number that cannot work.
    """

    specs: Sequence[Spec]
    lengths: Sequence[int] = LENGTHS
    model: str = "smollm2-135m"
    adapter: str | None = None
    dtype: str = "auto"
    weights: Weights = "auto"
    device: str | None = None
    new_tokens: int = 32
    """Tokens that are decoded after each first question."""
    repeats: int = 3
    """Rounds; in each, all contenders take one turn."""
    full_to: int = 32768
    """Longest text that `full` reads; beyond, a fit."""
    limit_minutes: float = 10.0
    """Most minutes of one contender's turn."""
    threads: int | None = None
    """Of every contender; None: torch's own number."""

    def __post_init__(self) -> None:
        parse_weights(self.weights)
        for name, lowest in {"new_tokens": 2, "repeats": 1, "threads": 1}.items():
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise ConfigError(f"{name} is {value}; it must be at least {lowest}.")
        if not 0 < self.limit_minutes <= MOST_MINUTES:  # nor is nan
            raise ConfigError(f"limit_minutes is {self.limit_minutes:g}; it must be above 0, at most {MOST_MINUTES:,}.")


def parse_contenders(names: str, settings: Sequence[str] = (), files: Sequence[str] = ()) -> list[Spec]:
    """Contenders by name, and variants of `focus` and `llama.cpp`.

    Args:
        names: separated by commas.
        settings: `name=value,...` changes every contender of the kind `focus`; `NAME:name=value,...` changes the
            contender of that name, or adds one.
        files: `FILE` is the GGUF file of `llama.cpp`; `NAME=FILE` adds a contender that is llama.cpp with that file.

    Raises:
        ConfigError: an unknown contender, a missing file, or a setting that is not understood. Values are
            checked by `FocusConfig`.
    """
    wanted = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    for name in wanted:
        if name not in CONTENDERS:
            raise ConfigError(unknown("contender", name, CONTENDERS))
    common: dict[str, Any] = {}
    own: dict[str, dict[str, Any]] = {}
    for text in settings:
        name, colon, rest = text.rpartition(":")
        if not colon:
            common |= dict(map(parse_setting, rest.split(",")))
        elif not name or CONTENDERS.get(name, ("focus",))[0] != "focus":
            raise ConfigError(f"the setting {text!r} is for {name!r}, which takes none; only variants of focus do.")
        else:
            own[name] = own.get(name, {}) | dict(map(parse_setting, rest.split(",")))
    paths = dict(_parse_file(text) for text in files)
    specs = []
    for name in dict.fromkeys([*wanted, *own, *paths]):
        kind, fixed = CONTENDERS.get(name, ("llama.cpp" if name in paths else "focus", {}))
        changes = {**common, **fixed, **own.get(name, {})} if kind == "focus" else {}
        specs.append(Spec(name, kind, changes, paths.get(name)))
    if not specs:
        raise ConfigError(f"there is nothing to measure; name contenders among {', '.join(CONTENDERS)}.")
    return specs


def sample_text() -> str:
    """The Python language reference, which comes with every Python: about 110,000 tokens."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def _parse_file(text: str) -> tuple[str, Path]:
    name, equals, file = text.partition("=")
    name, path = (name, Path(file)) if equals else ("llama.cpp", Path(text))
    if CONTENDERS.get(name, ("llama.cpp",))[0] != "llama.cpp":
        raise ConfigError(f"the file {path} is for {name!r}, which reads none; only variants of llama.cpp do.")
    if not os.path.isfile(path):
        raise ConfigError(f"there is no file {path}; check the path that --gguf names.")
    return name, path
