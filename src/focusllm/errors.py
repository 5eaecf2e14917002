"""Everything that FocusLLM raises on purpose.

    FocusError                 base class; the message says the value, the limit and the remedy
    ├── ConfigError            a setting or a length that cannot work (also a ValueError)
    ├── ModelError             a base model that cannot work, or that cannot be loaded
    ├── AdapterError           candidate projections of another model, or a damaged file
    ├── DocumentError          a document or a question that cannot be read
    ├── LibraryError           a library that cannot be opened or used as asked, or a document that is not in it
    ├── MemoryLimitError       more memory is needed than there is (announced before it is spent)
    └── TrainingError          a training that cannot go on; says what is saved and how to go on

The command line prints the message of a `FocusError` as one line and exits with code 2.
"""

import unicodedata

UNSHOWN = {"Cc", "Cs", "Zl", "Zp"}
"""Categories of characters: controls, halves of others (in names: bytes that are no UTF-8), and ends of lines."""


class FocusError(Exception):
    """Base class of the errors that are meant for the user; the message is one line, whatever names it has in it."""

    def __init__(self, message: object = ""):
        super().__init__(shown(str(message)))


class ConfigError(FocusError, ValueError):
    """A setting or a length that cannot work."""


class ModelError(FocusError):
    """A base model that the method cannot work with, or that cannot be loaded."""


class AdapterError(FocusError):
    """Candidate projections that do not belong to the model, or whose files are damaged."""


class DocumentError(FocusError):
    """A document or a question that cannot be read."""


class LibraryError(FocusError):
    """A library that cannot be opened or used as asked, or a document that is not in it."""


class MemoryLimitError(FocusError):
    """An operation that would need more memory than is free."""


class TrainingError(FocusError):
    """A training that cannot begin or go on."""


def shown(text: str) -> str:
    """A name or a message as it can be printed on one line: other characters are written as Python would."""
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) in UNSHOWN else c for c in text)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind if it has none: the reason inside a message of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def missing_package(what: str, package: str, extra: str) -> ConfigError:
    """A package is not installed: what needs it (`retrieval needs`, say), and the extra that brings it."""
    return ConfigError(f"{what} the package {package}: pip install '.[{extra}]' in a clone of focusllm.")
