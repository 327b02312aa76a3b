"""A model for tests of serving: no torch, and an answer that tells which request it belongs to."""

from collections.abc import Sequence

import numpy as np

from openvla.action_spec import usual_spec
from openvla.observation import Observation
from openvla.serving.contract import Answer, Dataset, ModelInfo, Request


BINS = 256


class FakeModel:
    """The first number of an action is the mean of the first image / 1000, the second the length of the instruction /
    1000; `batches` holds the sizes of what it was asked."""

    def __init__(self, cameras=("image",), chunk=1, state_dim=None, keys=("robot",), dims=7, stated=False):
        dataset = Dataset(usual_spec(dims), state_dim, low=(-1.0,) * dims, high=(1.0,) * dims, stated=stated)
        self.info = ModelInfo(
            "fake", dict.fromkeys(keys, dataset), keys[0] if len(keys) == 1 else None, tuple(cameras), chunk, (8, 8)
        )
        self.batches: list[int] = []
        self.ended: list[str] = []

    def act(self, requests: Sequence[Request]) -> list[Answer]:
        self.batches.append(len(requests))
        return [self._answer(request) for request in requests]

    def _answer(self, request: Request) -> Answer:
        actions = np.zeros((self.info.chunk, self.info.datasets[request.unnorm_key].spec.action_dim))
        actions[:, 0] = next(iter(request.observation.images.values())).mean() / 1000
        actions[:, 1] = len(request.observation.instruction) / 1000
        distributions = None
        if request.distributions:
            places = np.clip(np.round((actions + 1) / 2 * (BINS - 1)), 0, BINS - 2).astype(int)
            distributions = np.zeros((*actions.shape, BINS), np.float32)
            np.put_along_axis(distributions, places[..., None], 0.75, axis=-1)
            np.put_along_axis(distributions, places[..., None] + 1, 0.25, axis=-1)
        timing = {"infer_ms": 1.0}
        return Answer(actions, actions.copy(), np.full_like(actions, 0.75), timing, distributions)

    def warm_up(self, batch_sizes: Sequence[int]) -> None:
        pass

    def end_session(self, session: str) -> None:
        self.ended.append(session)


def request(level: int = 0, instruction: str = "open the drawer", **given) -> Request:
    """Of one camera that sees a gray of that level."""
    image = np.full((8, 8, 3), level, np.uint8)
    observation = Observation({"image": image}, np.zeros(0, np.float32), instruction)
    return Request(**{"observation": observation, "unnorm_key": "robot", **given})


def warm(server):
    """A `TestClient` of an app, once its engine is ready."""

    async def wait():
        await server.app.state.service.warm

    server.portal.call(wait)
    return server
