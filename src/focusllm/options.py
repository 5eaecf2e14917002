"""What people type: lengths, settings, names. One sentence on what cannot be understood. No torch."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection
from typing import Any

from focusllm.errors import ConfigError
from focusllm.json_text import parse_json

FACTORS = {"K": 2**10, "M": 2**20}
BYTES = {**FACTORS, "G": 2**30, "T": 2**40}
WORDS: dict[str, Any] = {"true": True, "false": False, "none": None}


def parse_lengths(text: str) -> list[int]:
    """Lengths like `4096,32K,1M` (K is 1024), each once, in order.

    Raises:
        ConfigError: one that is not a number of at least 1.
    """
    lengths = set()
    for part in text.split(","):
        word = part.strip().upper()
        factor = FACTORS.get(word[-1:], 1)
        digits = word[:-1] if factor > 1 else word
        if not digits.isdecimal() or int(digits) < 1:
            raise ConfigError(
                f"the length {part.strip()!r} is not a number of at least 1; write lengths as 4096,32K,1M."
            )
        lengths.add(int(digits) * factor)
    return sorted(lengths)


def parse_bytes(text: str) -> int:
    """A number of bytes like `500M`, `20G` or `1.5T` (powers of 1024).

    Raises:
        ConfigError: it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if found is None:
        raise ConfigError(f"{text!r} is not a number of bytes; write it as 500M or 20G.")
    return int(float(found[1]) * BYTES.get(found[2].upper(), 1))


def parse_setting(text: str) -> tuple[str, Any]:
    """`name=value`: the value as JSON or Python has it (numbers, true, null, None), else as a string.

    Raises:
        ConfigError: no name or no value.
    """
    name, equals, value = (piece.strip() for piece in text.partition("="))
    if not (name and equals and value):
        raise ConfigError(f"the setting {text!r} is not name=value; write it so.")
    if value.lower() in WORDS:
        return name, WORDS[value.lower()]
    try:
        return name, parse_json(value)
    except ValueError:
        return name, value


def unknown(kind: str, name: str, known: Collection[str]) -> str:
    """One sentence on a mistyped name: what is near it, or what there is."""
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}."
    return f"there is no {kind} {name!r}; {hint}"
