"""Everything that FocusLLM raises on purpose.

    FocusError                 base class; the message says the value, the limit and the remedy
    ├── ConfigError            a setting or a length that cannot work (also a ValueError)
    ├── ModelError             a base model that cannot work, or that cannot be loaded
    ├── AdapterError           candidate projections of another model, or a damaged file
    ├── DocumentError          a document or a question that cannot be read
    ├── MemoryLimitError       more memory is needed than there is (announced before it is spent)
    └── TrainingError          a training that cannot go on; says what is saved and how to go on

The command line prints the message of a `FocusError` as one line and exits with code 2.
"""


class FocusError(Exception):
    """Base class of the errors that are meant for the user."""


class ConfigError(FocusError, ValueError):
    """A setting or a length that cannot work."""


class ModelError(FocusError):
    """A base model that the method cannot work with, or that cannot be loaded."""


class AdapterError(FocusError):
    """Candidate projections that do not belong to the model, or whose files are damaged."""


class DocumentError(FocusError):
    """A document or a question that cannot be read."""


class MemoryLimitError(FocusError):
    """An operation that would need more memory than is free."""


class TrainingError(FocusError):
    """A training that cannot begin or go on."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind if it has none: the reason inside a message of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def missing_package(what: str, package: str, extra: str) -> ConfigError:
    """A package is not installed: what needs it (`retrieval needs`, say), and the extra that brings it."""
    return ConfigError(f"{what} the package {package}: pip install '.[{extra}]' in a clone of focusllm.")
