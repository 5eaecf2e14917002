"""What a client is told when something cannot be done, in its dialect. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from focusllm.errors import FocusError, MemoryLimitError, shown
from focusllm.serving.refusals import ClosedError, QueueFullError

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "server_error",
    503: "overloaded_error",
}

ANTHROPIC = "/v1/messages"
"""What the paths of Anthropic's dialect begin with."""
ANTHROPIC_TYPES = {**TYPES, 500: "api_error", 503: "overloaded_error"}
OVERLOADED = 529
"""What Anthropic's API says for 503."""

NO_FIELDS = ("body", "str", "int")
"""Words in pydantic's places that are not a request's."""


class ApiError(HTTPException):
    """A refusal.

    Args:
        status: of HTTP. message: a sentence. param: the field that it is about. code: a word for programs.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(status, _whole(shown(message)), headers)
        self.param, self.code = param and _whole(param), code

    def body(self, path: str = "", request_id: str | None = None) -> dict[str, Any]:
        """As the API says it that has this path: OpenAI's, if it is not Anthropic's."""
        if is_anthropic(path):
            kind = ANTHROPIC_TYPES.get(self.status_code, "invalid_request_error")
            return {"type": "error", "error": {"type": kind, "message": self.detail}, "request_id": request_id}
        kind = TYPES.get(self.status_code, "invalid_request_error" if self.status_code < 500 else "server_error")
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}

    def response(self, path: str = "", request_id: str | None = None) -> JSONResponse:
        """The whole of it."""
        status = OVERLOADED if self.status_code == 503 and is_anthropic(path) else self.status_code
        return JSONResponse(self.body(path, request_id), status, self.headers)


def is_anthropic(path: str) -> bool:
    """Whether a path is of Anthropic's dialect."""
    return path == ANTHROPIC or path.startswith(f"{ANTHROPIC}/")


def _whole(text: str) -> str:
    """A text that can be sent: halves of characters, which JSON can name, as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def of_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """What pydantic found wrong with a request; the first thing is named. Of a field of several types, it says of each
    why it is not that: what is wrong with the value tells more than that it is of another type.
    """
    first = next((error for error in errors if not str(error["type"]).endswith("_type")), errors[0])
    place = ".".join(str(part) for part in first["loc"] if part not in NO_FIELDS and "[" not in str(part)) or None
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"Unrecognized request argument supplied: {place}.", place, "unknown_parameter")
    if first["type"] == "json_invalid":
        return ApiError(400, "The body of the request is not valid JSON.", code="invalid_json")
    where = f"{place}: " if place else ""
    return ApiError(400, f"{where}{first['msg']}.", place, "invalid_value")


def of_error(error: BaseException) -> ApiError:
    """What went wrong while a request was worked on; of what is not the client's nothing is told."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), code="queue_full", headers={"Retry-After": str(error.retry_after)})
    if isinstance(error, ClosedError):
        return ApiError(503, str(error), code="shutting_down", headers={"Retry-After": "30"})
    if isinstance(error, MemoryLimitError):
        return ApiError(413, str(error), code="memory_limit")
    if isinstance(error, FocusError):
        return ApiError(400, str(error))
    return ApiError(500, "The server failed at this request; its log says why.")
