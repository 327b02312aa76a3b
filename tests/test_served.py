"""The simulator of `openvla serve --sim`."""

import asyncio

import numpy as np
import pytest
from fake_serving import FakeModel
from test_serving_page import FakeEngine
from toy import make_line

from openvla.evaluation import EVALUATION_SEEDS, served
from openvla.evaluation.workers import EnvironmentFailure
from openvla.serving.episodes import Episodes, Simulator


def test_a_world_of_meta_world_for_the_cameras_of_a_model(opengl):
    given = Simulator(**served.served())
    assert len(given.tasks) == 10 and given.tasks["drawer-open-v3"] == "open the drawer"
    assert given.seeds == EVALUATION_SEEDS and (given.max_steps, given.frequency) == (125, 20.0)
    assert "metaworld" in given.unnorm_keys
    model = FakeModel(cameras=("primary", "wrist"), keys=("other", "metaworld"))
    engine = FakeEngine(model)

    async def episode():
        episodes = Episodes(given, engine)
        episodes.start("drawer-open-v3")
        while episodes.last.running and episodes.last.step < 2:
            await episodes.after(episodes.last.number)
        await episodes.close()
        return episodes.last

    last = asyncio.run(asyncio.wait_for(episode(), 120))
    assert last.message == "Stopped." and last.jpeg[:2] == b"\xff\xd8"
    seen = engine.requests[0]
    assert seen.unnorm_key == "metaworld"
    assert [image.shape for image in seen.observation.images.values()] == [(224, 224, 3)] * 2


def test_a_world_that_breaks_says_why_without_paths():
    world = served.ServedWorld("metaworld", ["primary"])
    world._process.make = make_line
    try:
        world.reset(0, "raise")
        world.step(np.zeros(7))
        world.step(np.zeros(7))
        with pytest.raises(EnvironmentFailure, match="the arm fell off in arm.xml"):
            world.step(np.zeros(7))
    finally:
        world.close()
