"""Batches, deadlines, refusals: the engine with a model that waits until a test lets it through."""

import asyncio
import threading
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import wraps

import numpy as np
import pytest
from fake_serving import FakeModel, request

from openvla.serving import engine as engines
from openvla.serving.contract import BadRequest, Busy, Failed, Hung, Late, Superseded
from openvla.serving.engine import Engine
from openvla.serving.waiting import RecentPeak
from openvla.serving.worker import sizes_up_to


FOREVER = 1e6  # milliseconds: what is waited for so long makes a test fail


class Gated(FakeModel):
    """Begins with a batch, and ends when it is let through."""

    def __init__(self):
        super().__init__()
        self.began, self.through = threading.Semaphore(0), threading.Semaphore(0)

    def act(self, requests):
        self.began.release()
        assert self.through.acquire(timeout=30)
        return super().act(requests)

    async def has_begun(self):
        assert await asyncio.to_thread(self.began.acquire, timeout=30)


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def of(session, level=0, step=None, **given):
    asked = request(level, session=session, **given)
    return replace(asked, observation=replace(asked.observation, step=step))


@asynccontextmanager
async def running(model=None, **options):
    engine = Engine(model or FakeModel(), **options)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop(patience=10)


def in_loop(test):
    """A test that is a coroutine."""

    @wraps(test)
    def run(*args, **fixtures):
        asyncio.run(test(*args, **fixtures))

    return run


def soon(awaitable):
    return asyncio.wait_for(awaitable, 30)


async def asked(engine, *requests):
    """Tasks of requests that are in the queue."""
    tasks = [asyncio.ensure_future(engine.act(one)) for one in requests]
    await asyncio.sleep(0)
    return tasks


def level(answer):
    return round(float(answer.actions[0, 0]) * 1000)


# Batches


@in_loop
async def test_a_lone_robot_does_not_wait():
    async with running(max_wait_ms=FOREVER) as engine:
        for number in range(5):
            answer = await soon(engine.act(of("a", number)))
            assert level(answer) == number and answer.timing["batch_size"] == 1
            assert answer.timing["queue_ms"] >= 0 and "infer_ms" in answer.timing
        assert engine.outcomes == {"answered": 5} and engine.batches == {1: 5}


@in_loop
async def test_robots_that_come_together_share_batches():
    model = FakeModel()
    async with running(model, max_wait_ms=FOREVER) as engine:
        robots = [of(str(number), number) for number in range(4)]
        answers = await soon(asyncio.gather(*map(engine.act, robots)))
        assert [level(answer) for answer in answers] == [0, 1, 2, 3]
        three = await asked(engine, *robots[:3])  # four asked at once a moment ago: the fourth is waited for
        for _ in range(10):
            await asyncio.sleep(0)
        assert model.batches == [4] and engine.waiting() == 3
        await soon(asyncio.gather(engine.act(robots[3]), *three))
        assert model.batches == [4, 4]


@in_loop
async def test_the_wait_is_bounded_and_forgotten():
    model, clock = FakeModel(), Clock()
    async with running(model, max_wait_ms=1, clock=clock) as engine:
        await soon(asyncio.gather(engine.act(of("a")), engine.act(of("b"))))
        await soon(engine.act(of("a")))  # after a millisecond in which b does not come
    async with running(model, max_wait_ms=FOREVER, clock=clock) as engine:
        await soon(asyncio.gather(engine.act(of("a")), engine.act(of("b"))))
        clock.now += 2.5
        await soon(engine.act(of("a")))
    assert model.batches == [2, 1, 2, 1]


@in_loop
async def test_no_batch_is_larger_than_asked_for():
    model = FakeModel()
    async with running(model, max_batch=3) as engine:
        await soon(asyncio.gather(*(engine.act(request(number)) for number in range(8))))
    assert max(model.batches) == 3 and sum(model.batches) == 8


@in_loop
async def test_every_robot_gets_its_own_answers():
    model = FakeModel()

    async def robot(engine, number):
        for step in range(25):
            answer = await soon(engine.act(of(f"robot {number}", (number * 25 + step) % 256, step)))
            assert level(answer) == (number * 25 + step) % 256

    async with running(model, max_batch=4, queue_size=20) as engine:
        await asyncio.gather(*(robot(engine, number) for number in range(10)))
        assert engine.outcomes == {"answered": 250} and engine.unanswered() == engine.waiting() == 0


# Queue


@in_loop
async def test_a_full_queue_says_when_to_come_back():
    model = Gated()
    async with running(model, queue_size=2) as engine:
        (first,) = await asked(engine, of("first"))
        await model.has_begun()
        queued = await asked(engine, of("a"), of("b"))
        with pytest.raises(Busy, match="2 requests wait already") as refused:
            await engine.act(of("c"))
        assert 0 < refused.value.retry_after < 10 and refused.value.content()["code"] == "busy"
        newer = await asked(engine, of("a", 7))  # takes the place of the older one
        with pytest.raises(Superseded):
            await queued[0]
        model.through.release(2)
        answers = await soon(asyncio.gather(first, queued[1], *newer))
        assert level(answers[2]) == 7 and engine.outcomes == {"answered": 3, "busy": 1, "superseded": 1}


@in_loop
async def test_the_newest_observation_wins():
    model = Gated()
    async with running(model, max_batch=1) as engine:
        (running_one,) = await asked(engine, of("a", 1, step=1))
        await model.has_begun()
        (second, other), (third,) = await asked(engine, of("a", 2, step=2), of("b")), await asked(engine, of("a", 3, 3))
        with pytest.raises(Superseded, match="newer observation"):
            await second
        with pytest.raises(Superseded, match="step=2: step 3 of this session came in before it"):
            await engine.act(of("a", 2, step=2))  # overtaken on its way
        without_session = await asked(engine, request(5), request(6))
        model.through.release(5)
        assert [level(await soon(task)) for task in (running_one, third, *without_session)] == [1, 3, 5, 6]
        await soon(other)
        assert model.batches == [1] * 5


@in_loop
async def test_who_floods_keeps_its_place_and_no_more():
    model = Gated()
    async with running(model, max_batch=1) as engine:
        plug, *_ = await asked(engine, of("plug"))
        await model.has_begun()
        flood = await asked(engine, of("flood", 0), of("b", 100), *(of("flood", number) for number in range(1, 50)))
        model.through.release(3)
        found = await soon(asyncio.gather(plug, *flood, return_exceptions=True))
        answered = [level(answer) for answer in found if not isinstance(answer, Superseded)]
        assert answered == [0, 100, 49]


@in_loop
async def test_an_ended_session_is_forgotten():
    model = Gated()
    async with running(model) as engine:
        (plug,) = await asked(engine, of("a", 1))
        await model.has_begun()
        (before,) = await asked(engine, of("a", 2))
        engine.end_session("a")
        engine.end_session("never heard of")
        with pytest.raises(Superseded, match="'a' has ended"):
            await before
        (after,) = await asked(engine, of("a", 3))
        model.through.release(2)
        assert level(await soon(plug)) == 1 and level(await soon(after)) == 3
        assert model.ended == ["a", "never heard of"]


@in_loop
async def test_ends_of_sessions_wait_in_bounded_number():
    model = Gated()
    async with running(model) as engine:
        (plug,) = await asked(engine, of("a"))
        await model.has_begun()
        for number in range(5000):
            engine.end_session(f"robot {number}")
        model.through.release(2)
        await soon(plug)
        await soon(engine.act(of("a")))
        assert len(model.ended) == 1024


@in_loop
async def test_an_older_observation_than_the_one_with_the_model_is_not_answered():
    model = Gated()
    async with running(model) as engine:
        (newest,) = await asked(engine, of("a", 5, step=5))
        await model.has_begun()
        with pytest.raises(Superseded, match="step=4: step 5 of this session came in before it"):
            await engine.act(of("a", 4, step=4))
        again, other = await asked(engine, of("a", 6, step=5), of("b", 7, step=0))
        engine.end_session("a")  # the next episode begins
        (first,) = await asked(engine, of("a", 8, step=0))
        model.through.release(3)
        answers = await soon(asyncio.gather(newest, other, first))
        assert [level(answer) for answer in answers] == [5, 7, 8] and isinstance(again.exception(), Superseded)
        (slow,) = await asked(engine, of("a", 9, step=9))
        await model.has_begun()
        await model.has_begun()
        slow.cancel()  # who waits no more for it may begin again
        (first,) = await asked(engine, of("a", 10, step=0))
        model.through.release(2)
        assert level(await soon(first)) == 10


# Deadlines and clients that leave


@in_loop
async def test_late_requests():
    model, clock = Gated(), Clock()
    async with running(model, clock=clock) as engine:
        with pytest.raises(Late):
            await engine.act(of("a", deadline=clock.now))
        (slow,) = await asked(engine, of("a", deadline=clock.now + 1000))
        await model.has_begun()
        with pytest.raises(Late, match="before the deadline"):  # in real time, while the model is at work
            await soon(engine.act(of("b", deadline=clock.now + 0.001)))
        assert engine.waiting() == 0
        queued = await asked(engine, of("c", deadline=clock.now + 500), of("d"))
        clock.now += 600
        model.through.release(2)
        with pytest.raises(Late):  # when its turn comes
            await soon(queued[0])
        await soon(queued[1])
        await soon(slow)
        assert model.batches == [1, 1]
        await model.has_begun()
        (slow,) = await asked(engine, of("a", deadline=clock.now + 500))
        await model.has_begun()
        clock.now += 600
        model.through.release()
        with pytest.raises(Late):  # when it is done
            await soon(slow)


@in_loop
async def test_who_leaves_frees_his_place():
    model = Gated()
    async with running(model, queue_size=1) as engine:
        (running_one,) = await asked(engine, of("a"))
        await model.has_begun()
        (queued,) = await asked(engine, of("b"))
        with pytest.raises(Busy):
            await engine.act(of("c"))
        for task in (queued, running_one):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        (after,) = await asked(engine, of("c", 9))
        model.through.release(2)
        assert level(await soon(after)) == 9
        assert model.batches == [1, 1] and engine.outcomes == {"gone": 2, "busy": 1, "answered": 1}


# What the model fails at


class Failing(FakeModel):
    """Fails as the instruction says, and at batches of more than `fits`."""

    fits, gone = 1000, False

    def act(self, requests):
        if self.gone:
            raise RuntimeError("CUDA error: device-side assert triggered")
        words = [one.observation.instruction for one in requests]
        if len(requests) > self.fits:
            raise MemoryError(len(requests))
        if "raise" in words:
            raise RuntimeError("secret of the server")
        if "refuse" in words:
            raise BadRequest("instruction: too long")
        answers = super().act(requests)
        for one, answer in zip(requests, answers):
            if one.observation.instruction == "nan":
                answer.actions[0, 3] = np.nan
            if one.observation.instruction == "inf":
                answer.normalized[0, 3] = np.inf
            if one.observation.instruction == "doubt":
                answer.probabilities[0, 3] = np.nan
        return answers[:-1] if "lose" in words else answers


@in_loop
async def test_what_fails_does_so_alone(caplog):
    wrong = ["raise", "nan", "inf", "refuse", "lose", "doubt"]
    async with running(Failing()) as engine:
        requests = [of(str(number), number) for number in range(6)]
        requests[1:1] = [of(name, instruction=name) for name in wrong]
        found = await soon(asyncio.gather(*map(engine.act, requests), return_exceptions=True))
        kinds = [type(one) for one in found[1:7]]
        assert kinds == [Failed, Failed, Failed, BadRequest, Failed, Failed]
        assert [level(answer) for answer in [found[0], *found[7:]]] == [0, 1, 2, 3, 4, 5]
        assert "secret" not in str(found[1]) and "do not move" in str(found[1])
        assert level(await soon(engine.act(of("a", 9)))) == 9
        assert engine.outcomes == {"answered": 7, "failed": 5, "bad_request": 1} and engine.batches == {12: 1, 1: 1}
    assert "secret of the server" in caplog.text and "Traceback" in caplog.text and "no finite numbers" in caplog.text


@in_loop
async def test_what_a_model_refuses_costs_the_others_nothing():
    """One robot whose instruction was too long had all others predicted in halves of halves."""

    class Choosy(FakeModel):
        def act(self, requests):
            wrong = [one.observation.instruction == "wrong" for one in requests]
            return [BadRequest("shorten") if no else one for no, one in zip(wrong, super().act(requests))]

    model = Choosy()
    async with running(model, max_wait_ms=FOREVER) as engine:
        requests = [of(str(number), number, instruction="wrong" if number == 2 else "go") for number in range(5)]
        found = await soon(asyncio.gather(*map(engine.act, requests), return_exceptions=True))
        assert [level(one) for one in (*found[:2], *found[3:])] == [0, 1, 3, 4] and model.batches == [5]
        assert isinstance(found[2], BadRequest) and engine.outcomes == {"answered": 4, "bad_request": 1}
        assert not engine._worker.failing


@in_loop
async def test_memory_that_is_too_small(caplog):
    model = Failing()
    model.fits = 2
    async with running(model, max_batch=8) as engine:
        found = await soon(asyncio.gather(*(engine.act(request(number)) for number in range(8))))
        assert [level(answer) for answer in found] == list(range(8))
        assert (engine.limit, engine.out_of_memory, model.batches) == (2, 3, [2, 2, 2, 2])
        await soon(asyncio.gather(*(engine.act(request(number)) for number in range(4))))
        assert engine.out_of_memory == 3 and "at most 2" in caplog.text  # not tried again
        model.fits = 0
        with pytest.raises(Failed, match="Memory is too small"):
            await soon(engine.act(request()))
        model.fits = 2
        assert level(await soon(engine.act(request(5)))) == 5 and engine.limit == 2


@in_loop
async def test_who_is_too_large_alone_makes_no_batches_small_for_others():
    """One such request among 16 had each asked by itself, until the server was started again."""

    class Narrow(FakeModel):
        def act(self, requests):
            if any(request.observation.instruction == "too long" for request in requests):
                raise MemoryError
            return super().act(requests)

    model = Narrow()
    async with running(model, max_batch=8) as engine:
        asked_for = [request(number) for number in range(8)]
        asked_for[5] = request(5, "too long")
        found = await soon(asyncio.gather(*map(engine.act, asked_for), return_exceptions=True))
        assert isinstance(found.pop(5), Failed) and [level(answer) for answer in found] == [0, 1, 2, 3, 4, 6, 7]
        assert engine.limit == 8 and engine.out_of_memory == 4
        await soon(asyncio.gather(*(engine.act(request(number)) for number in range(8))))
        assert model.batches[-1] == 8


@in_loop
async def test_a_model_that_fails_at_everything_is_told_and_comes_back(caplog, monkeypatch):
    """As where a GPU is gone: it was called ready, so that nobody started it again, and robots kept coming."""
    monkeypatch.setattr(engines, "AGAIN", 0.01)
    model = Failing()
    async with running(model) as engine:
        await soon(engine.act(request()))
        for words in ("raise", "nan", "raise"):  # theirs, since the model answers what it has answered before
            with pytest.raises(Failed):
                await soon(engine.act(request(instruction=words)))
            assert engine.ready
        model.gone = True
        with pytest.raises(Failed, match="do not move"):
            await soon(engine.act(request()))
        await asyncio.sleep(0)
        assert not engine.ready and engine.state == "failing"
        with pytest.raises(Busy, match="fails at all that it is asked"):
            await engine.act(request())
        assert caplog.text.count("fails at what it has answered before") == 1
        model.gone = False
        while not engine.ready:
            await asyncio.sleep(0.01)
        assert level(await soon(engine.act(request(7)))) == 7
        model.gone = True
        with pytest.raises(Failed):
            await soon(engine.act(request()))
        monkeypatch.setattr(engines, "AGAIN", 1e6)
    assert engine.state == "stopped"  # at once


# A model that hangs


@in_loop
async def test_a_model_that_hangs_is_told_and_comes_back(caplog):
    model, clock = Gated(), Clock()
    async with running(model, hang_after=0.01, max_batch=1, clock=clock) as engine:
        accepted = await asked(engine, of("a", 1), of("b", 2))
        await model.has_begun()
        clock.now += 5
        assert engine.predicting() == 5
        for task in accepted:
            with pytest.raises(Hung, match="hangs"):
                await soon(task)
        assert not engine.ready and engine.state == "hung" and engine.waiting() == 0
        assert isinstance(engine.problem, Hung) and "not returned" in caplog.text
        with pytest.raises(Hung) as refused:  # at once
            await engine.act(of("a", 3))
        assert refused.value.status == 503 and refused.value.retry_after > 0
        engine.end_session("a")  # does not wait either
        model.through.release()
        while not engine.ready:
            await asyncio.sleep(0.001)
        assert engine.problem is None and engine.predicting() == 0 and "has returned" in caplog.text
        model.through.release()
        assert level(await soon(engine.act(of("a", 4)))) == 4  # and not what it was late with
        assert model.batches == [1, 1] and engine.outcomes == {"hung": 3, "answered": 1}


@in_loop
async def test_a_stop_does_not_wait_for_a_model_that_hangs():
    model = Gated()
    engine = Engine(model, hang_after=0.01)
    await engine.start()
    with pytest.raises(Hung):
        await soon(engine.act(of("a")))
    await soon(engine.stop(patience=FOREVER))
    assert engine.state == "stopped"
    model.through.release()


# Life


class Warming(FakeModel):
    def __init__(self, fits=100):
        super().__init__()
        self.sizes, self.fits = [], fits

    def warm_up(self, batch_sizes):
        self.sizes.append(list(batch_sizes))
        if max(batch_sizes) > self.fits:
            raise MemoryError
        if self.fits < 0:
            raise RuntimeError("broken weights")


@in_loop
async def test_warm_up_comes_first():
    model = Warming(fits=4)
    engine = Engine(model, max_batch=12)
    starting = asyncio.ensure_future(engine.start())
    assert not engine.ready
    with pytest.raises(Busy, match="warming up") as refused:
        await engine.act(of("a"))
    assert refused.value.retry_after > 0
    await soon(starting)
    assert engine.ready and engine.limit == 3
    assert model.sizes == [[1, 2, 4, 8, 12], [1, 2, 4, 6], [1, 2, 3]]
    await soon(engine.act(of("a")))
    await engine.stop()


@in_loop
async def test_a_model_that_does_not_warm_up(caplog):
    for fits in (-1, 0):
        engine = Engine(Warming(fits), max_batch=1)
        with pytest.raises(Failed, match="could not be warmed up"):
            await soon(engine.start())
        assert not engine.ready and engine.state == "broken"
        with pytest.raises(Busy):
            await engine.act(of("a"))
        await engine.stop()
    assert "Traceback" in caplog.text


@in_loop
async def test_a_stop_answers_what_was_accepted():
    model = Gated()
    async with running(model, max_batch=2, max_wait_ms=FOREVER) as engine:
        accepted = await asked(engine, of("a", 1), of("b", 2), of("c", 3))
        await model.has_begun()
        stopping = asyncio.ensure_future(engine.stop(patience=30))
        await asyncio.sleep(0)
        assert not engine.ready and engine.state == "stopping"
        with pytest.raises(Busy, match="stopping"):
            await engine.act(of("d"))
        model.through.release(2)
        assert [level(answer) for answer in await soon(asyncio.gather(*accepted))] == [1, 2, 3]
        await soon(stopping)
        assert engine.state == "stopped"


@in_loop
async def test_a_stop_without_patience_leaves_nobody_waiting():
    model = Gated()
    engine = Engine(model, max_batch=1)
    await engine.start()
    accepted = await asked(engine, of("a", 1), of("b", 2))
    await model.has_begun()
    await soon(engine.stop(patience=0))
    for task in accepted:
        with pytest.raises(Busy, match="stopping"):
            await soon(task)
    model.through.release(2)


@in_loop
async def test_a_stop_during_warm_up():
    engine = Engine(FakeModel())
    starting = asyncio.ensure_future(engine.start())
    await asyncio.sleep(0)
    await soon(engine.stop())
    await soon(starting)
    assert not engine.ready and engine.state == "stopped"


def test_recent_peaks():
    peak = RecentPeak(1.0)
    assert peak.peak(5.0) == 0
    peak.see(3, 5.1)
    peak.see(1, 5.9)
    assert peak.peak(5.9) == 3
    peak.see(2, 6.2)
    assert peak.peak(6.5) == 3 and peak.peak(7.3) == 2 and peak.peak(9.9) == 0


def test_sizes():
    assert [sizes_up_to(limit) for limit in (1, 2, 3, 16)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 8, 16]]
