"""How late answers are: measured as the loop asks, on what is seen first, without what only a first call takes."""

import os
import threading
import time

import numpy as np
import pytest
from toy import FromPixels, Line, make_line

from openvla.evaluation import latency
from openvla.evaluation.latency import decide_latency, median_latency, single_latency
from openvla.evaluation.loop import Job, run_episodes
from openvla.evaluation.report import NoEpisodes
from openvla.observation import Observation


class Clocked:
    """Takes the seconds of `times`, one after the other, by a clock of its own."""

    def __init__(self, times, monkeypatch):
        self.times, self.now, self.begun, self.seen = list(times), 0.0, 0, []
        monkeypatch.setattr(latency.time, "perf_counter", lambda: self.now)

    def reset(self, slot=0):
        self.begun += 1
        self.now += 7.0  # what an episode takes to begin is no prediction

    def act(self, observations):
        self.seen += observations
        self.now += self.times[len(self.seen) - 1]
        return np.zeros((len(observations), 7))


def test_the_median_of_ten_predictions_each_of_which_begins_an_episode(monkeypatch):
    seen = Observation({"front": np.zeros((4, 4, 3), np.uint8)}, np.zeros(0, np.float32), "go")
    policy = Clocked([9.0, 8.0, *[0.1] * 4, 0.2, *[0.3] * 4, 50.0], monkeypatch)
    assert median_latency(policy, seen) == pytest.approx(0.25)  # neither the first two nor one that was held up
    assert policy.begun == len(policy.seen) == 12 and all(one is seen for one in policy.seen)


def test_an_observation_that_nothing_has_seen(monkeypatch):
    policy = Clocked([0.5] * 12, monkeypatch)
    assert single_latency(policy, "go", 8) == pytest.approx(0.5)
    assert policy.seen[0].images["image"].shape == (8, 8, 3) and policy.seen[0].instruction == "go"


class Broken(Line):
    def reset(self, seed, task, variation=""):
        raise RuntimeError("no arm in /home/me/arm.xml")


def test_a_simulator_that_breaks_at_once_measures_nothing(tmp_path):
    with pytest.raises(NoEpisodes, match="No latency can be measured: RuntimeError: no arm in arm.xml"):
        decide_latency(None, {}, FromPixels(), Broken, ("", "left"), tmp_path)
    assert decide_latency(None, {}, None, Broken, ("", "left"), tmp_path) == 0.0  # an expert takes no time
    measured = decide_latency(None, {}, FromPixels(), make_line, ("", "left"), tmp_path)
    assert 0 <= measured < 1


class DiesUnasked(Line):
    """Its process ends after an answer and before the next question."""

    def reset(self, seed, task, variation=""):
        if task == "dies":
            threading.Timer(0.05, os._exit, [3]).start()
        return super().reset(seed, task, variation)


class Slow(FromPixels):
    def act(self, observations):
        time.sleep(0.3 if len(self.batches) < 1 else 0.0)
        return super().act(observations)


def test_a_process_that_died_while_the_policy_thought_breaks_its_episode_alone(tmp_path):
    jobs = [Job("dies", 0, 100), Job("left", 0, 100)]
    records = run_episodes(Slow(), DiesUnasked, jobs, tmp_path, videos=0, progress=False, workers=1)
    assert records[0].error == "the process of the environment died (exit code 3)" and records[0].steps == 0
    assert records[1].success
