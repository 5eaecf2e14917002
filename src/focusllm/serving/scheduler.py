"""Whose turn it is. It knows jobs by their owners and in what state they are, and no model.

waiting   admitted as there is room: of the owner first who has fewest under way, then in order
reading   a chunk each, in turns; and in turns with them what else needs the model (a document that is read, say)
decoding  all together, a token each
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator

from focusllm.serving.job import Choice, Job
from focusllm.serving.refusals import QueueFullError

Task = Callable[[], None]
"""What else needs the model, no longer than reading a chunk takes."""


class Scheduler:
    """Jobs in their states.

    Args:
        max_running: most jobs that are read and decoded at once. max_waiting: most that wait for that.
    """

    def __init__(self, max_running: int = 16, max_waiting: int = 64):
        self.max_running, self.max_waiting = max_running, max_waiting
        self.waiting: list[Job] = []
        self.reading: deque[Job] = deque()
        self.decoding: list[Choice] = []
        self.tasks: deque[Task] = deque()
        self._is_turn_of_tasks = True
        self._owed = 0.0  # seconds that were read, while others decoded, more than they have had since

    @property
    def running(self) -> list[Job]:
        """All jobs that were admitted, each once."""
        return list(dict.fromkeys([*self.reading, *(choice.job for choice in self.decoding)]))

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.waiting or self.reading or self.decoding or self.tasks)

    def submit(self, job: Job) -> None:
        """Take a job.

        Raises:
            QueueFullError: too many wait already.
        """
        if len(self.waiting) >= self.max_waiting:
            raise QueueFullError(f"{len(self.waiting)} requests are waiting already; try again later.")
        self.waiting.append(job)

    def admit(self) -> list[Job]:
        """Let jobs that wait begin, as many as there is room for; which."""
        under_way = Counter(job.owner for job in self.running)
        admitted = []
        while self.waiting and under_way.total() < self.max_running:
            job = min(self.waiting, key=lambda job: under_way[job.owner])  # the first of equals
            self.waiting.remove(job)
            self.reading.append(job)
            under_way[job.owner] += 1
            admitted.append(job)
        return admitted

    def next_to_read(self) -> Job | Task | None:
        """The job whose turn it is to read a chunk, or a task; the others come first the next time. None: it is
        nobody's.
        """
        if not self.decoding:
            self._owed = 0.0
        if self._owed > 0:
            return None
        if self.tasks and (self._is_turn_of_tasks or not self.reading):
            self._is_turn_of_tasks = False
            return self.tasks.popleft()
        self._is_turn_of_tasks = True
        if not self.reading:
            return None
        self.reading.rotate(-1)
        return self.reading[-1]

    def spent(self, reading: float, decoding: float) -> None:
        """Seconds of a step: a chunk takes as long as many tokens, which are made up for before the next one."""
        self._owed = max(0.0, self._owed + reading - decoding)

    def begin_decoding(self, job: Job) -> None:
        """A job has read all that there is."""
        self.reading.remove(job)
        self.decoding.extend(job.choices)

    def drop(self, choice: Choice) -> None:
        """A choice is complete."""
        self.decoding.remove(choice)

    def remove(self, job: Job) -> None:
        """Forget a job, whatever its state."""
        if job in self.waiting:
            self.waiting.remove(job)
        if job in self.reading:
            self.reading.remove(job)
        self.decoding = [choice for choice in self.decoding if choice.job is not job]

    def cancelled(self) -> Iterator[Job]:
        """The jobs that nobody waits for any more."""
        return (job for job in [*self.waiting, *self.running] if job.is_cancelled)
