"""How transformers generates with a folder that FocusLLM saved, when it is loaded with `trust_remote_code=True`.

`save_pretrained` puts a copy of this file into the folder, so that `transformers serve FOLDER --trust-remote-code` and
whatever else calls `model.generate()` reads with FocusLLM. Without that trust the folder is the plain base model.
"""

from __future__ import annotations

from typing import Any

from focusllm import FocusForCausalLM


def generate(*inputs: Any, model: Any, **arguments: Any) -> Any:
    """Transformers' `generate()` with all its arguments.

    Args:
        model: the base model, as it was loaded from the folder; it gets the folder's candidate projections, which
            change nothing but this.
    """
    focus = FocusForCausalLM.from_loaded(model)
    if "generate" in vars(model):  # this function, put there when the model was loaded: later calls need not look again
        model.generate = focus.generate
    return focus.generate(*inputs, **arguments)
