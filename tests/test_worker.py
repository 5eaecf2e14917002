"""Jobs, their scheduler and the worker: what they get is what they would get alone; no HTTP."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conftest import SMALL, build, byte_tokenizer, random_ids, with_candidates
from focusllm import FocusConfig, FocusForCausalLM, FocusLLM, MemoryLimitError
from focusllm.memory.chunk_cache import SharedChunks
from focusllm.serving.job import Done, Event, Failed, Finished, Job, Piece, Progress, Prompt
from focusllm.serving.refusals import ClosedError, QueueFullError
from focusllm.serving.sampling import Sampler, Sampling
from focusllm.serving.scheduler import Scheduler
from focusllm.serving.stops import StopStrings
from focusllm.serving.worker import Worker


class Asked:
    """A job and what it was told."""

    def __init__(self, ids: list[int], config: FocusConfig, owner: str = "", **sampling: Any):
        self.events: list[Event] = []
        self.job = Job(Prompt.of(ids, config), Sampling(**sampling), self.events.append, owner)

    def tokens(self, choice: int = 0) -> list[int]:
        pieces = [event for event in self.events if isinstance(event, Piece) and event.choice == choice]
        return [chosen.token for piece in pieces for chosen in piece.tokens]

    def text(self, choice: int = 0) -> str:
        return "".join(e.text for e in self.events if isinstance(e, Piece) and e.choice == choice)

    def reasons(self) -> list[str]:
        return [event.reason for event in self.events if isinstance(event, Finished)]


@pytest.fixture(params=["condensed", "opened"])
def worker(request: pytest.FixtureRequest, tiny_llm: FocusLLM) -> Worker:
    tiny_llm.model.focus_config = tiny_llm.config.replace(far_context=request.param)
    return Worker(tiny_llm.model, tiny_llm.tokenizer)


@pytest.fixture
def opened(tiny_llm: FocusLLM) -> Worker:
    tiny_llm.model.focus_config = tiny_llm.config.replace(far_context="opened")
    return Worker(tiny_llm.model, tiny_llm.tokenizer)


def run(worker: Worker, *asked: Asked) -> None:
    for one in asked:
        worker.submit(one.job)
    while worker.step():
        pass


def alone(worker: Worker, ids: list[int], count: int) -> list[int]:
    """What transformers' own loop makes of a prompt."""
    made = worker.model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, eos_token_id=None)
    return made[0, len(ids) :].tolist()


def test_every_job_gets_what_it_would_get_alone(worker: Worker) -> None:
    """Of unequal lengths, joining between steps; one goes on until its oldest local tokens become chunks."""
    texts = [random_ids(length, seed=length) for length in (300, 40, 137, 64, 65)]
    counts = [30, 12, 40, 1, 20]
    wanted = [alone(worker, ids, count) for ids, count in zip(texts, counts, strict=True)]
    asked = [
        Asked(ids, worker.config, max_tokens=count, ignore_eos=True) for ids, count in zip(texts, counts, strict=True)
    ]
    for number, one in enumerate(asked):
        worker.submit(one.job)
        for _ in range(3 * number):
            worker.step()
    run(worker)
    assert [one.tokens() for one in asked] == wanted
    for one, ids, count in zip(asked, texts, counts, strict=True):
        assert one.reasons() == ["length"]
        done = one.events[-1]
        assert isinstance(done, Done)
        assert (done.usage.prompt, done.usage.generated) == (len(ids), count)
        assert one.text() == worker.tokenizer.decode(one.tokens())


def test_a_long_read_lets_others_decode_between_chunks(worker: Worker) -> None:
    quick = Asked(random_ids(30), worker.config, max_tokens=40, ignore_eos=True)
    worker.submit(quick.job)
    worker.step()
    long = Asked(random_ids(320, seed=1), worker.config, max_tokens=4, ignore_eos=True)
    worker.submit(long.job)
    num_chunks = len(long.job.prompt.pieces)
    assert num_chunks > 10
    steps = long.job.prompt.steps
    for number in range(num_chunks):
        before = quick.job.num_generated
        while worker.totals.read_tokens < sum(steps[: number + 1]):
            worker.step()
        assert worker.totals.read_tokens == sum(steps[: number + 1])
        assert quick.job.num_generated > before or not quick.job.choices
    run(worker)
    assert len(long.tokens()) == 4
    progress = [event for event in long.events if isinstance(event, Progress)]
    assert [event.processed for event in progress] == [0, *torch.tensor(long.job.prompt.steps).cumsum(0).tolist()]
    assert progress[-1].processed == progress[-1].total


def test_chunks_that_were_read_are_not_read_again(worker: Worker) -> None:
    """The same text, and one that goes on; the answers are those of texts that were read anew."""
    ids = random_ids(300)
    first, again, longer = (Asked(text, worker.config, max_tokens=6) for text in (ids, ids, ids + random_ids(60, 1)))
    for one in (first, again, longer):
        run(worker, one)
    usages = [one.events[-1].usage for one in (first, again, longer)]  # type: ignore[union-attr]
    assert usages[0].cached == 0 < usages[0].written < 300
    assert (usages[1].cached, usages[1].written) == (usages[0].written, 0)
    assert usages[2].cached > 150
    assert 0 < usages[2].written < 110
    assert again.tokens() == first.tokens()
    fresh = Worker(worker.model, worker.tokenizer)
    asked = Asked(ids + random_ids(60, 1), worker.config, max_tokens=6)
    run(fresh, asked)
    assert asked.tokens() == longer.tokens()


def test_kept_chunks_take_no_more_than_they_may(opened: Worker) -> None:
    model, heads = opened.model.base, opened.model.lookup_heads
    pieces = [random_ids(24, seed=number) for number in range(6)]
    room = SharedChunks(model, opened.config, heads, 10**9)
    size = sum(room.block(piece)[0].kv.nbytes + room.block(piece)[0].lookup.nbytes for piece in pieces) // 6
    few = SharedChunks(model, opened.config, heads, 3 * size)
    for piece in pieces:
        few.block(piece)
    assert (len(few), few.nbytes) == (3, 3 * size)
    assert not few.block(pieces[-1])[1]
    assert few.block(pieces[0])[1]
    assert few.count_known(pieces) == 3
    few.make_room(0)
    assert (len(few), few.nbytes) == (0, 0)


def test_readers_take_turns(opened: Worker) -> None:
    """A short text that comes behind a long one is read long before that is done."""
    long, short = Asked(random_ids(450), opened.config, max_tokens=1), Asked(random_ids(120, 1), opened.config)
    for one in (long, short):
        opened.submit(one.job)
    while not short.job.num_generated:
        opened.step()
    assert long.job.progress().processed < 100 < long.job.progress().total
    run(opened)
    order = Scheduler()
    jobs = [Asked(random_ids(100), opened.config).job for _ in range(3)]
    for job in jobs:
        order.submit(job)
    order.admit()
    assert [order.next_to_read() for _ in range(6)] == jobs * 2


def test_owners_take_turns() -> None:
    order = Scheduler(max_running=3, max_waiting=10)
    jobs = [Asked([3, 4], SMALL, owner=owner).job for owner in "aaaab"]
    for job in jobs:
        order.submit(job)
    assert order.admit() == [jobs[0], jobs[4], jobs[1]]
    assert order.admit() == []
    order.remove(jobs[0])
    assert order.admit() == [jobs[2]]


def test_reading_takes_half_of_the_time() -> None:
    order = Scheduler()
    reads, decodes = (Asked(random_ids(100), SMALL).job for _ in range(2))
    for job in (decodes, reads):
        order.submit(job)
    order.admit()
    assert [order.next_to_read(), order.next_to_read()] == [decodes, reads]
    decodes.choices.append(object())  # type: ignore[arg-type] - not looked into
    order.begin_decoding(decodes)
    assert order.next_to_read() is reads
    order.spent(reading=1.0, decoding=0.3)
    for _ in range(3):  # of which a second is made of 0.3 each
        assert order.next_to_read() is None
        order.spent(reading=0.0, decoding=0.3)
    assert order.next_to_read() is reads
    order.spent(reading=1.0, decoding=0.3)
    order.drop(order.decoding[0])
    assert order.next_to_read() is reads  # nobody waits


def test_a_full_queue_refuses(opened: Worker) -> None:
    opened.scheduler = Scheduler(max_running=1, max_waiting=2)
    asked = [Asked([5, 6, 7], opened.config, max_tokens=2, ignore_eos=True) for _ in range(3)]
    opened.submit(asked[0].job)
    opened.submit(asked[1].job)
    with pytest.raises(QueueFullError, match="2 requests are waiting") as refused:
        opened.submit(asked[2].job)
    assert refused.value.retry_after >= 1
    run(opened)
    run(opened, asked[2])
    assert [len(one.tokens()) for one in asked] == [2, 2, 2]


@pytest.mark.parametrize("steps", [0, 3, 20])
def test_a_cancelled_job_ends_within_a_step(worker: Worker, steps: int) -> None:
    """While it waits, reads or decodes; the others do not notice."""
    other = Asked(random_ids(90, 1), worker.config, max_tokens=30, ignore_eos=True)
    gone = Asked(random_ids(150), worker.config, max_tokens=500, ignore_eos=True, num_choices=2)
    for one in (other, gone):
        worker.submit(one.job)
    for _ in range(steps):
        worker.step()
    gone.job.cancel()
    worker.step()
    assert isinstance(gone.events[-1], Done)
    count = len(gone.events)
    assert gone.job not in [*worker.scheduler.running, *worker.scheduler.waiting]
    run(worker)
    assert len(gone.events) == count
    assert other.tokens() == alone(worker, random_ids(90, 1), 30)
    assert worker._preparing == {}


def test_the_end_of_a_text(opened: Worker) -> None:
    ids = random_ids(100)
    tokens = alone(opened, ids, 30)
    text = opened.tokenizer.decode(tokens)
    stop = text[8:11]
    asked = Asked(ids, opened.config, max_tokens=30, stop=("never there", stop), ignore_eos=True)
    run(opened, asked)
    assert asked.text() == text[: text.index(stop)]
    finished = next(event for event in asked.events if isinstance(event, Finished))
    assert (finished.reason, finished.stop_string) == ("stop", stop)
    opened.model.generation_config.eos_token_id = [2, tokens[5]]
    ended = Worker(opened.model, opened.tokenizer)
    asked = Asked(ids, opened.config, max_tokens=30)
    run(ended, asked)
    first = tokens.index(tokens[5])
    assert asked.text() == opened.tokenizer.decode(tokens[:first])
    assert asked.reasons() == ["stop"]


def test_seeds_and_choices(opened: Worker) -> None:
    """The same seed gives the same tokens in any company; choices of one job differ."""
    ids = random_ids(120)
    how: dict[str, Any] = {"max_tokens": 20, "temperature": 1.0, "top_p": 0.9, "ignore_eos": True, "num_choices": 3}
    alone = Asked(ids, opened.config, seed=7, **how)
    run(opened, alone)
    company = [Asked(random_ids(80 + n, n), opened.config, seed=n, **how) for n in range(2)]
    again, other = Asked(ids, opened.config, seed=7, **how), Asked(ids, opened.config, seed=8, **how)
    run(opened, company[0], again, company[1], other)
    tokens = [alone.tokens(number) for number in range(3)]
    assert [again.tokens(number) for number in range(3)] == tokens
    assert other.tokens(2) != tokens[2]
    assert len({tuple(found) for found in tokens}) == 3
    assert alone.reasons() == ["length"] * 3
    assert alone.events[-1].usage.generated == 60  # type: ignore[union-attr]


def test_sampling_is_transformers_own(opened: Worker) -> None:
    """Which tokens can be chosen, and how often the likeliest one is, by the definition."""
    logits = torch.tensor([2.0, 1.0, 0.5, -1.0, 3.0])
    opened.model.generation_config.suppress_tokens = [4]
    defaults, device = opened.model.generation_config, torch.device("cpu")
    sampler = Sampler(Sampling(temperature=0.7, top_p=0.8, seed=1), defaults, 0, device)
    drawn = torch.tensor([sampler.choose(logits, [1]).token for _ in range(600)]).bincount(minlength=5) / 600
    wanted = (logits[:4] / 0.7).softmax(-1)
    wanted = torch.where(wanted.cumsum(0) - wanted < 0.8, wanted, 0)
    torch.testing.assert_close(drawn[:4], wanted / wanted.sum(), atol=0.06, rtol=0)
    assert drawn[4] == 0
    assert Sampler(Sampling(temperature=1e-300), defaults, 0, device).choose(logits, [1]).token == 0
    chosen = Sampler(Sampling(top_logprobs=2), defaults, 0, device).choose(logits, [1])
    assert chosen.token == 0
    assert chosen.logprob == pytest.approx(float(logits.log_softmax(-1)[0]))
    assert [found.token for found in chosen.top] == [4, 0]


def test_repetition_is_punished_as_the_model_says(opened: Worker) -> None:
    opened.model.generation_config.repetition_penalty = 1.8
    ids = random_ids(110)
    asked = Asked(ids, opened.config, max_tokens=25, ignore_eos=True)
    run(opened, asked)
    assert asked.tokens() == alone(opened, ids, 25)


@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_stop_strings_in_pieces(size: int) -> None:
    for text, stops, wanted in [
        ("one two three", ["two"], "one "),
        ("aab aaab", ["aaab", "zz"], "aab "),
        ("no end here en", ["end."], "no end here en"),
        ("x##y#####z", ["####", "##y"], "x"),
        ("\n\nUser", ["\nUser", "\n\n"], ""),
    ]:
        found, said = StopStrings(stops), ""
        for first in range(0, len(text), size):
            said += found.push(text[first : first + size])
            if found.found:
                break
        assert said + ("" if found.found else found.finish()) == wanted


def test_what_goes_wrong_is_one_jobs_own(opened: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = (Asked(random_ids(n), opened.config, max_tokens=5, ignore_eos=True) for n in (90, 200))

    def refuse(model: Any, config: Any, num_tokens: int, *others: Any) -> str:
        if num_tokens > 100:
            raise MemoryLimitError("reading it needs more than there is.")
        return "device"

    monkeypatch.setattr("focusllm.serving.worker.check_read", refuse)
    run(opened, bad, good)
    assert len(good.tokens()) == 5
    assert isinstance(bad.events[-1], Failed)
    assert isinstance(bad.events[-1].error, MemoryLimitError)


def test_a_choice_that_fails_takes_its_job_with_it(opened: Worker, caplog: pytest.LogCaptureFixture) -> None:
    good = Asked(random_ids(90), opened.config, max_tokens=9, ignore_eos=True)
    bad = Asked(random_ids(95), opened.config, max_tokens=9, ignore_eos=True, num_choices=3)
    for one in (bad, good):
        opened.submit(one.job)
    while not (bad.job.num_generated and good.job.num_generated):
        opened.step()
    bad.job.choices[1].sampler = None  # type: ignore[assignment]
    run(opened)
    assert good.tokens() == alone(opened, random_ids(90), 9)
    assert isinstance(bad.events[-1], Failed)
    assert not any(isinstance(event, Done) for event in bad.events)
    assert "a step failed" in caplog.text


def test_a_choice_ends_where_the_positions_do() -> None:
    """Where the local context only grows; the job beside it goes on."""
    config = FocusConfig(
        *(24, 0, 200), prompt_length=6, plain_below=1, rechunk=False, far_context="condensed", decoding="cached"
    )
    worker = Worker(FocusForCausalLM(with_candidates(build()), config), byte_tokenizer())
    full, other = (Asked(random_ids(n), config, max_tokens=80, ignore_eos=True) for n in (250, 210))
    run(worker, full, other)
    assert full.reasons() == other.reasons() == ["length"]
    assert 40 < len(full.tokens()) < 80
    assert len(other.tokens()) > len(full.tokens()) - 10


def test_a_thread_that_works_until_it_is_closed(opened: Worker) -> None:
    opened.start()
    asked = Asked(random_ids(150), opened.config, max_tokens=8, ignore_eos=True)
    opened.submit(asked.job)
    assert opened.close(seconds=60) == 0
    assert len(asked.tokens()) == 8
    assert not opened.is_alive
    with pytest.raises(ClosedError, match="shutting down"):
        opened.submit(asked.job)
    other = Worker(opened.model, opened.tokenizer)
    other.start()
    endless = Asked(random_ids(150), opened.config, max_tokens=10**6, ignore_eos=True)
    other.submit(endless.job)
    assert other.close(seconds=0.2) == 1
    assert isinstance(endless.events[-1], Failed)
    assert isinstance(endless.events[-1].error, ClosedError)
    assert not other.is_alive
