"""Responses that were given, so that a conversation can go on by the id of its last one. No torch.

They are kept in memory, each for the key that asked, and forgotten when the server ends, or when newer ones need the
room: what is asked for longest not goes first.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from focusllm.serving.api_errors import ApiError
from focusllm.serving.responses_schema import Item

MOST_RESPONSES = 10_000
MOST_BYTES = 256 * 2**20


@dataclass(frozen=True)
class StoredResponse:
    """A response, what was asked, and all that was said before its answer."""

    body: dict[str, Any]
    input_items: Sequence[dict[str, Any]]
    """Of its own request, with ids."""
    conversation: Sequence[Item]
    """What was said before, the request's own items, and the answer; not the instructions."""
    nbytes: int = 0


class ResponseStore:
    """Responses by owner and id.

    Args:
        most_responses, most_bytes: of all owners together.
    """

    def __init__(self, most_responses: int = MOST_RESPONSES, most_bytes: int = MOST_BYTES):
        self._most_responses, self._most_bytes = most_responses, most_bytes
        self._found: OrderedDict[tuple[str, str], StoredResponse] = OrderedDict()
        self._nbytes = 0

    def add(
        self, owner: str, body: dict[str, Any], input_items: Sequence[dict[str, Any]], past: Sequence[Item]
    ) -> None:
        """Keep a response. Its bytes are those of all that was said before, too, which is held as long as it is."""
        nbytes = len(json.dumps(body)) + len(json.dumps(input_items)) + sum(item.nbytes for item in past)
        answer = [Item.model_validate(item) for item in body["output"]]
        self._found[owner, body["id"]] = StoredResponse(body, input_items, [*past, *answer], nbytes)
        self._nbytes += nbytes
        while len(self._found) > self._most_responses or self._nbytes > self._most_bytes:
            _, oldest = self._found.popitem(last=False)
            self._nbytes -= oldest.nbytes

    def get(self, owner: str, name: str, param: str | None = None) -> StoredResponse:
        """A response of this owner.

        Args:
            param: the field that named it.

        Raises:
            ApiError: 404, there is none: never, not any more, or another's.
        """
        found = self._found.get((owner, name))
        if found is None:
            raise ApiError(
                *(404, f"Response with id {name!r} not found; it may have been deleted, or forgotten for newer ones."),
                *(param, "previous_response_not_found" if param else None),
            )
        self._found.move_to_end((owner, name))
        return found

    def delete(self, owner: str, name: str) -> None:
        """Forget a response; conversations that went on from it stay whole.

        Raises:
            ApiError: as of `get`.
        """
        self._nbytes -= self.get(owner, name).nbytes
        del self._found[owner, name]
