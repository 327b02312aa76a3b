"""Slow models for replicas of Ray Serve: what `tests/test_ray.py` serves."""

import os
import time
from dataclasses import replace

from fake_serving import FakeModel


class SlowModel(FakeModel):
    """Takes 50 ms, and tells who answers."""

    def act(self, requests):
        time.sleep(0.05)
        return [replace(answer, timing={"pid": float(os.getpid())}) for answer in super().act(requests)]


def load(options):
    return SlowModel()


def load_broken(options):
    raise ValueError("weights are missing")
