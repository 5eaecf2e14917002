"""A response of /v1/responses while it comes: its events, and the whole."""

from __future__ import annotations

import copy
import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any

from focusllm.documents.answer import Citation
from focusllm.serving.answering import COMMENT, NUM_CITATIONS, Told
from focusllm.serving.api_errors import ApiError
from focusllm.serving.file_catalogue import StoredFile
from focusllm.serving.job import Cited, Event, Finished, Piece, Progress, Usage
from focusllm.serving.responses_schema import RESULTS, ResponsesRequest


class ResponseAnswer:
    """One response.

    Args:
        find: the file that one of the documents is, by its number; None: it is none. on_done: called with the whole.
    """

    def __init__(
        self, body: ResponsesRequest, find: Callable[[int], StoredFile | None], on_done: Callable[[Told], None]
    ):
        self._body, self._find, self._on_done = body, find, on_done
        self._number = 0
        self._text: Told = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self._message: Told = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "status": "in_progress",
            "content": [],
        }
        self._search: Told | None = None
        if body.tools:
            self._search = {
                "id": f"fs_{secrets.token_hex(12)}",
                "type": "file_search_call",
                "status": "in_progress",
                "queries": [body.items[-1].turn["content"]],
                "results": None,
            }
        self._is_begun = False
        self._sentences: list[Cited] = []
        self._finished: Finished | None = None
        self.whole: Told = {
            "id": f"resp_{secrets.token_hex(16)}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata,
            "model": body.model,
            "output": [],
            "parallel_tool_calls": False,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": None, "summary": None},
            "store": body.store,
            "temperature": body.temperature or 0.0,
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [tool.model_dump(exclude_unset=True) for tool in body.tools],
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": None,
        }

    def begin(self) -> Iterator[Told]:
        """The response without output; a search begins with the reading."""
        yield self._told("response.created", response=copy.deepcopy(self.whole))
        yield self._told("response.in_progress", response=copy.deepcopy(self.whole))
        if self._search is not None:
            yield self._added(self._search)
            self._search["status"] = "searching"
            yield self._of_search("in_progress")
            yield self._of_search("searching")

    def take(self, event: Event) -> Iterator[Told]:
        """Pieces of the text, and how far reading is."""
        if isinstance(event, Progress) and self._body.return_progress and event.total:
            progress = {
                "total": event.total,
                "cache": event.cached,
                "processed": event.processed,
                "time_ms": round(event.seconds * 1000),
            }
            yield self._told("response.in_progress", response=copy.deepcopy(self.whole), prompt_progress=progress)
        elif isinstance(event, Piece):
            yield from self._begin_text()
            if event.text:
                self._text["text"] += event.text
                yield self._of_text("response.output_text.delta", delta=event.text, logprobs=[])
        elif isinstance(event, Cited):
            self._sentences.append(event)
        elif isinstance(event, Finished):
            self._finished = event

    def end(self, usage: Usage) -> Iterator[Told]:
        """What was found, the parts and items once more as wholes, and the response."""
        assert self._finished is not None
        yield from self._begin_text()
        status = "incomplete" if self._finished.reason == "length" else "completed"
        if self._search is not None:
            self._search.update(status="completed", results=self._results())
            yield self._told("response.output_item.done", output_index=0, item=copy.deepcopy(self._search))
        for annotation in self._annotations():
            number = len(self._text["annotations"])
            self._text["annotations"].append(annotation)
            name = "response.output_text.annotation.added"
            yield self._of_text(name, annotation_index=number, annotation=annotation)
        yield self._of_text("response.output_text.done", text=self._text["text"], logprobs=[])
        yield self._of_text("response.content_part.done", part=copy.deepcopy(self._text))
        self._message.update(status=status, content=[self._text])
        yield self._told(
            "response.output_item.done", output_index=self._index(self._message), item=copy.deepcopy(self._message)
        )
        if status == "incomplete":
            self.whole["incomplete_details"] = {"reason": "max_output_tokens"}
        self.whole.update(status=status, usage=_usage(usage), completed_at=int(time.time()))
        self._on_done(self.whole)
        yield self._told(f"response.{status}", response=self.whole)

    def fail(self, error: ApiError) -> Iterator[Told]:
        """An error that clients raise."""
        yield {**error.body(), **self._told("error", code=error.code, message=error.detail, param=error.param)}

    def ping(self) -> str:
        """Nothing for programs."""
        return COMMENT

    def _begin_text(self) -> Iterator[Told]:
        """The message's item, once; all is read then."""
        if self._is_begun:
            return
        self._is_begun = True
        if self._search is not None:
            yield self._of_search("completed")
        yield self._added(self._message)
        yield self._of_text("response.content_part.added", part=copy.deepcopy(self._text))

    def _told(self, kind: str, **more: Any) -> Told:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **more}

    def _added(self, item: Told) -> Told:
        self.whole["output"].append(item)
        return self._told("response.output_item.added", output_index=self._index(item), item=copy.deepcopy(item))

    def _index(self, item: Told) -> int:
        return next(number for number, known in enumerate(self.whole["output"]) if known is item)

    def _of_search(self, state: str) -> Told:
        assert self._search is not None
        return self._told(f"response.file_search_call.{state}", output_index=0, item_id=self._search["id"])

    def _of_text(self, kind: str, **more: Any) -> Told:
        place = {"item_id": self._message["id"], "output_index": self._index(self._message), "content_index": 0}
        return self._told(kind, **place, **more)

    def _results(self) -> list[dict[str, Any]] | None:
        """The passages that the model looked at most while it wrote; its attention is the score."""
        if RESULTS not in self._body.include or self._finished is None or self._finished.citations is None:
            return None
        (tool,) = self._body.tools
        most, least = tool.max_num_results or NUM_CITATIONS, tool.ranking_options.score_threshold
        return [
            {
                **self._file(found),
                "score": found.weight,
                "text": found.text,
                "attributes": {"start": found.start, "end": found.end},
            }
            for found in self._finished.citations[:most]
            if found.weight >= least
        ]

    def _annotations(self) -> list[dict[str, Any]]:
        """Where each sentence ends, the files that were looked at as it was written, each by its first passage."""
        found = []
        for cited in self._sentences:
            files: dict[tuple[int, str], Citation] = {}
            for citation in cited.sentence.citations[:NUM_CITATIONS]:
                files.setdefault((citation.document_index, citation.document), citation)
            for citation in files.values():
                passage = {
                    "start": citation.start,
                    "end": citation.end,
                    "weight": citation.weight,
                    "text": citation.text,
                }
                head = {"type": "file_citation", "index": cited.sentence.end}
                found.append({**head, **self._file(citation), "passage": passage})
        return found

    def _file(self, citation: Citation) -> dict[str, str]:
        """A file that was sent along, or is of a set, has no id but its name."""
        known = self._find(citation.document_index)
        return {
            "file_id": known.id if known else citation.document,
            "filename": known.filename if known else citation.document,
        }


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": usage.written},
        "output_tokens": usage.generated,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt + usage.generated,
    }
