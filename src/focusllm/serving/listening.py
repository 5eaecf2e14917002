"""Jobs' events in an event loop: the way from the worker's thread to a response, and back when a client is gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from focusllm.serving.api_errors import of_error
from focusllm.serving.job import Done, Event, Failed, Job, Prompt, Usage
from focusllm.serving.refusals import ClosedError, QueueFullError
from focusllm.serving.sampling import Sampling
from focusllm.serving.worker import Worker

Result = TypeVar("Result")


class Listening:
    """Some jobs of one request, and what they tell.

    Args:
        worker: who works on them. prompts: one job each.

    Raises:
        ApiError: there is no room for all of them (429), or the server is to stop (503); none is worked on then.
    """

    def __init__(self, worker: Worker, prompts: Sequence[Prompt], sampling: Sampling, owner: str):
        self._worker = worker
        self._told: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self.jobs = [
            Job(prompt, sampling, _emitter(number, self._told), owner) for number, prompt in enumerate(prompts)
        ]
        self.usage = Usage(0, 0, 0, 0)
        """Of those that are done."""
        try:
            for job in self.jobs:
                worker.submit(job)
        except (QueueFullError, ClosedError) as error:
            self.cancel()
            raise of_error(error) from error

    def __del__(self) -> None:  # of a response that never began
        for job in self.jobs:
            job.cancel()

    def cancel(self) -> None:
        """End their work."""
        for job in self.jobs:
            self._worker.cancel(job)

    async def events(self, ping_seconds: float | None = None) -> AsyncIterator[tuple[int, Event] | None]:
        """(job, event) until all are done; None after so many seconds of silence. Left early, it ends the work.

        Raises:
            ApiError: one of them failed.
        """
        left = len(self.jobs)
        try:
            while left:
                try:
                    number, event = await asyncio.wait_for(self._told.get(), ping_seconds)
                except TimeoutError:
                    yield None
                    continue
                if isinstance(event, Failed):
                    raise of_error(event.error) from event.error
                if isinstance(event, Done):
                    left -= 1
                    self.usage += event.usage
                yield number, event
        finally:
            if left:
                self.cancel()


def _emitter(number: int, told: asyncio.Queue[tuple[int, Event]]) -> Callable[[Event], None]:
    """From any thread into a queue of this event loop."""
    loop = asyncio.get_running_loop()

    def emit(event: Event) -> None:
        with suppress(RuntimeError):  # the loop is gone, and who asked with it
            loop.call_soon_threadsafe(told.put_nowait, (number, event))

    return emit


async def while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """What comes of some work, which ends when the client goes away.

    Raises:
        ClientDisconnect: it did.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()
        raise ClientDisconnect
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
