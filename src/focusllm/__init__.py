"""FocusLLM: let decoder-only language models read very long text (arXiv 2408.11745)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from focusllm.config import FocusConfig
    from focusllm.conversation import Conversation
    from focusllm.documents.answer import Answer, AnswerStream, Citation
    from focusllm.documents.document import Document
    from focusllm.errors import (
        AdapterError,
        ConfigError,
        DocumentError,
        FocusError,
        LibraryError,
        MemoryLimitError,
        ModelError,
        TrainingError,
    )
    from focusllm.huggingface.adapter_files import load_adapter, push_adapter, save_adapter
    from focusllm.huggingface.modeling import FocusForCausalLM, FocusState
    from focusllm.library.library import Library
    from focusllm.llm import FocusLLM
    from focusllm.method.adapter import AdapterConfig, inject, remove
    from focusllm.training.config import TrainConfig
    from focusllm.training.run import train

__version__ = "0.1.0"

_HOMES = {
    "AdapterConfig": "method.adapter",
    "inject": "method.adapter",
    "load_adapter": "huggingface.adapter_files",
    "push_adapter": "huggingface.adapter_files",
    "remove": "method.adapter",
    "save_adapter": "huggingface.adapter_files",
    "FocusConfig": "config",
    "AdapterError": "errors",
    "ConfigError": "errors",
    "DocumentError": "errors",
    "FocusError": "errors",
    "LibraryError": "errors",
    "MemoryLimitError": "errors",
    "ModelError": "errors",
    "TrainingError": "errors",
    "Answer": "documents.answer",
    "AnswerStream": "documents.answer",
    "Citation": "documents.answer",
    "Conversation": "conversation",
    "Document": "documents.document",
    "FocusLLM": "llm",
    "Library": "library.library",
    "FocusForCausalLM": "huggingface.modeling",
    "FocusState": "huggingface.modeling",
    "TrainConfig": "training.config",
    "train": "training.run",
}

__all__ = [
    "AdapterConfig",
    "AdapterError",
    "Answer",
    "AnswerStream",
    "Citation",
    "ConfigError",
    "Conversation",
    "Document",
    "DocumentError",
    "FocusConfig",
    "FocusError",
    "FocusForCausalLM",
    "FocusLLM",
    "FocusState",
    "Library",
    "LibraryError",
    "MemoryLimitError",
    "ModelError",
    "TrainConfig",
    "TrainingError",
    "inject",
    "load_adapter",
    "push_adapter",
    "remove",
    "save_adapter",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import on first use, so that `import focusllm` and the command line's help do not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'focusllm' has no attribute {name!r}")
    return getattr(importlib.import_module(f"focusllm.{_HOMES[name]}"), name)
