"""Stop strings in a text that comes in pieces. No torch."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Hands on what certainly stands before the first stop string.

    Args:
        stops: not empty strings.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops, self._held = tuple(stops), ""
        self.found: str | None = None
        """The one that ended the text."""

    def push(self, piece: str) -> str:
        """Take the next piece: what is final now, often less or more than it."""
        text = self._held + piece
        places = [(place, stop) for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            place, self.found = min(places, key=lambda found: (found[0], -len(found[1])))
            self._held = ""
            return text[:place]
        count = max((_begun(text, stop) for stop in self._stops), default=0)
        final = len(text) - count
        self._held = text[final:]
        return text[:final]

    def finish(self) -> str:
        """What was held back; no pieces come any more."""
        held, self._held = self._held, ""
        return held


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of a text are the beginning of a stop string."""
    longest = min(len(stop) - 1, len(text))
    return next((count for count in range(longest, 0, -1) if text.endswith(stop[:count])), 0)
