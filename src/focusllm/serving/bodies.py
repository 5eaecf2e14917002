"""What the bodies of requests have in common, whatever the dialect. No torch."""

from __future__ import annotations

import base64
import json
from collections.abc import Collection, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from focusllm.serving.api_errors import ApiError


class Body(BaseModel):
    """A part of a request: types as they are said, nothing that is not known."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _is_unicode(cls, data: Any) -> Any:
        """JSON can name halves of characters, which no text has, and which could not be sent back."""
        for name, value in data.items() if isinstance(data, dict) else ():
            try:
                json.dumps([name, value], ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                half = f"\\u{ord(error.object[error.start]):04x}"
                what = "There is half of a character"
                raise ApiError(400, f"{name} is not Unicode text: {what} ({half}); send whole ones.", name) from error
        return data


def of_client(data: Any, ignored: Collection[str], unsupported: Mapping[str, Collection[Any]]) -> Any:
    """The fields of a body that say something; null says nothing.

    Args:
        ignored: fields that change no answer. unsupported: those that would, each with its values that would not.

    Raises:
        ApiError: one of these is there, by its name.
    """
    if not isinstance(data, dict):
        return data
    for name, neutral in unsupported.items():
        if data.get(name) is not None and data[name] not in neutral:
            raise ApiError(400, f"{name} is not supported; leave it out.", name, "unsupported_parameter")
    left_out = {*ignored, *unsupported}
    return {
        name: value for name, value in data.items() if name not in left_out and (value is not None or name == "model")
    }


def of_base64(data: str, what: str, param: str) -> bytes:
    """A file that stands in a request, as base64 or as a `data:` address of that.

    Args:
        what: it is called. param: the field that it stands in.

    Raises:
        ApiError: it is not base64.
    """
    head, _, rest = data.partition(",") if data.startswith("data:") else (";base64", "", data)
    try:
        if not head.endswith(";base64"):
            raise ValueError(head)
        return base64.b64decode(rest, validate=True)
    except ValueError as error:
        raise ApiError(400, f"{what} is not base64; encode the file's bytes.", param) from error
