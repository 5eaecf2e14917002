"""Why a worker takes no more. No torch."""

from __future__ import annotations

from focusllm.errors import FocusError


class QueueFullError(FocusError):
    """There are too many requests already.

    Args:
        retry_after: seconds after which there may be room.
    """

    def __init__(self, message: str, retry_after: int = 1):
        super().__init__(message)
        self.retry_after = retry_after


class ClosedError(FocusError):
    """The worker ends."""
