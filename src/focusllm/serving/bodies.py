"""What the bodies of requests have in common, whatever the dialect. No torch."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Collection, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from focusllm.serving.api_errors import ApiError


class Body(BaseModel):
    """A part of a request: types as they are said, nothing that is not known."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


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


def of_base64(data: str, param: str) -> bytes:
    """A file that stands in a request.

    Raises:
        ApiError: it is not base64.
    """
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(400, f"{param} is not base64 ({error}).", param) from error
