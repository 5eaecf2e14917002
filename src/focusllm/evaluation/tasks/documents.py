"""Many questions on one document: accuracy, and seconds a question when what was read is kept.

document   plain text (--text) of the given length with one made-up fact a question, evenly spread; all questions of a
           length have the same document, so a method that keeps what it read answers the later ones faster
"""

from __future__ import annotations

from collections.abc import Iterator

from focusllm.evaluation.example import Example, Setting, Task
from focusllm.evaluation.tasks.passkey import PLACES, ROLES, fact, must_have


class DocumentQuestions(Task):
    """Right when the number that is asked for occurs in the answer."""

    name, needs = "document", "text"

    def examples(self, length: int | None, limit: int, setting: Setting) -> Iterator[Example]:
        """One document, `limit` questions; no more than there are subjects."""
        length = must_have(self, length)
        limit = min(limit, len(ROLES) * len(PLACES))
        rng = setting.rng(self.name, length)
        subjects = rng.permutation(len(ROLES) * len(PLACES))[:limit]
        facts = [fact(rng, int(index)) for index in subjects]
        depths = [(i + 0.5) / limit for i in range(limit)]
        lines = [sentence for sentence, _, _ in facts]
        longest = max((question for _, question, _ in facts), key=len)
        room = setting.room(self.name, length, "".join(f"\n{line}\n" for line in lines), longest, max_new_tokens=24)
        start = int(rng.integers(setting.haystack.num_tokens))
        room -= 4 * limit + 4  # where cuts tokenise anew
        text = setting.haystack.with_inserts(start, room, list(zip(depths, lines, strict=True)))
        for i in rng.permutation(limit):
            _, question, number = facts[i]
            meta = {"depth": round(depths[i], 2), "document": "one"}
            yield Example(str(i), "", text, question, (number,), max_new_tokens=24, meta=meta)


TASKS: tuple[Task, ...] = (DocumentQuestions(),)
