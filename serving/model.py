"""An OpenVLA model as what the engine asks."""

import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from itertools import count
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ..action_spec import spec_of
from ..action_tokenizer import unnormalize_actions
from ..device import torch_device
from ..hub import model_folder, published_name, variant_of
from ..observation import Observation
from ..options.serving import ServeOptions
from ..policy import OpenVLAPolicy, load_model
from ..prompts_openvla import check_prompt_ids, end_with_empty
from .contract import Answer, BadRequest, Dataset, ModelInfo, Refusal, Request


if TYPE_CHECKING:
    from ..modeling_openvla import OpenVLAForActionPrediction


logger = logging.getLogger(__name__)
SESSIONS = 1024  # of which drafts are kept; a draft is a few hundred bytes
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")  # how torch says it, by allocator


class OpenVLAModel:
    """A `contract.Model`. Tokens do not depend on what else is asked for at once, nor on what was kept of a session, in
    float32; half precision and quantization round a little otherwise in a batch of another size.

    Args:
        name: What clients are told the model is.
        unnorm_key: Dataset of requests that name none. Default: the only one that the model knows.
        sessions: How many it keeps drafts of; those that asked longest ago give way.
        compile: Of `prepare_for_inference`.
        decoding: Of `OpenVLAPolicy`.

    Raises:
        KeyError: If `unnorm_key` is unknown.
        ValueError: If the model sees a state, and no dataset says what its numbers are.
    """

    def __init__(
        self,
        model: "OpenVLAForActionPrediction",
        name: str,
        unnorm_key: str | None = None,
        sessions: int = SESSIONS,
        compile: bool = False,
        decoding: str = "mode",
    ):
        known, state_dim = dict(model.norm_stats or {}), model.config.proprio_dim
        self.policy = OpenVLAPolicy(model, unnorm_key or next(iter(known), None), decoding=decoding)
        served = [key for key, entry in known.items() if state_dim is None or entry.get("proprio") is not None]
        if not served:
            raise ValueError(
                f"'{name}' sees the state of the robot, and its statistics have no proprio of any dataset."
            )
        if unnorm_key is not None and unnorm_key not in served:
            raise ValueError(
                f"unnorm_key='{unnorm_key}': '{name}' sees the state of the robot, and that dataset has statistics of "
                f"none (proprio); those that have: {', '.join(served)}."
            )
        height, width = model.vision_backbone.input_shape[1:]
        self.info = ModelInfo(
            model=name,
            datasets={key: dataset_of(model, key) for key in served},
            default_key=unnorm_key or (served[0] if len(served) == 1 else None),
            cameras=tuple(model.camera_names),
            chunk=model.action_chunk,
            image_size=(height, width),
        )
        self.sessions, self.compile = sessions, compile
        self._slots: OrderedDict[str, int] = OrderedDict()  # session -> where the policy keeps its draft
        self._numbers = count()
        self._problem = lru_cache(1024)(self._find_problem)  # a robot says the same at every step

    @classmethod
    def load(cls, options: ServeOptions) -> Self:
        """What `openvla predict` with these options acts with.

        Raises:
            FileNotFoundError: If the model is not there.
            ValueError, KeyError: As `load_model` and the class.
        """
        folder = model_folder(options.model)
        model = load_model(
            str(folder),
            device=torch_device(options.device),
            dtype=options.dtype,
            quantization=options.quantization,
            **variant_of(folder, options.action_head, options.action_chunk),
        )
        more: dict[str, Any] = {"compile": options.compile, "decoding": options.decoding or "mode"}
        return cls(model, published_name(options.model), options.unnorm_key, **more)

    def act(self, requests: Sequence[Request]) -> list[Answer | Refusal]:
        """See `contract.Model`; a `BadRequest` where the model cannot read the instruction.

        Raises:
            MemoryError: If there is too little memory, on whatever device.
        """
        problems = [self._problem(request.observation.instruction) for request in requests]
        answers = iter(self._answers([request for request, problem in zip(requests, problems) if not problem]))
        return [BadRequest(problem) if problem else next(answers) for problem in problems]

    def _answers(self, requests: Sequence[Request]) -> list[Answer]:
        if not requests:
            return []
        slots = [self._slot(request.session) for request in requests]
        observations = [replace(request.observation, slot=slot) for request, slot in zip(requests, slots)]
        try:
            with memory_errors():
                found = self.policy.predict(
                    observations,
                    [request.unnorm_key for request in requests],
                    **({"return_distributions": True} if any(request.distributions for request in requests) else {}),
                )
        finally:  # also where the second dataset of a batch failed
            for request, slot in zip(requests, slots):
                if request.session is None:
                    self.policy.reset(slot)
        return [answer(prediction, request.distributions) for prediction, request in zip(found, requests)]

    def warm_up(self, batch_sizes: Sequence[int]) -> None:
        key = self.info.default_key or next(iter(self.info.datasets))
        with memory_errors():
            made = self.policy.model.prepare_for_inference(
                batch_sizes, prompt_buckets=(32, 64), unnorm_key=key, compile=self.compile
            )
        if self.compile and not made.compiled:
            logger.warning("Nothing was compiled (--compile): %s", made.reason or "this model has no graphs here")
        state = np.zeros(self.info.datasets[key].state_dim or 0, np.float32)
        height, width = self.info.image_size
        frame = np.zeros((height + 1, width, 3), np.uint8)  # to be resized, as those of robots: all libraries are there
        images = dict.fromkeys(self.info.cameras, frame)
        request = Request(Observation(images, state, "open the drawer"), key)
        for size in batch_sizes:
            for _ in range(2):  # libraries choose their kernels in the first
                self.act([request] * size)

    def end_session(self, session: str) -> None:
        slot = self._slots.pop(session, None)
        if slot is not None:
            self.policy.reset(slot)

    def _slot(self, session: str | None) -> int:
        """Where the policy keeps the draft of a session; no number is given twice."""
        slot = next(self._numbers)
        if session is None:
            return slot
        slot = self._slots.setdefault(session, slot)
        self._slots.move_to_end(session)
        while len(self._slots) > self.sessions:
            self.end_session(next(iter(self._slots)))
        return slot

    def _find_problem(self, instruction: str) -> str:
        """Why the model cannot read an instruction; nothing if it can."""
        model = self.policy.model
        action_dim = max(dataset.spec.action_dim for dataset in self.info.datasets.values())
        try:
            prompt = model.processor.prompt_ids(instruction)
            check_prompt_ids(prompt, model.config)
            num_tokens = model.action_head.num_tokens((self.info.chunk, action_dim))
            end_with_empty(prompt, model.config, model.num_patches, num_tokens)
        except ValueError as error:
            return f"instruction: {error}"
        return ""


def answer(prediction: dict[str, np.ndarray], with_distributions: bool) -> Answer:
    """Of what a policy predicts, see `OpenVLAPolicy.predict`."""
    distributions = prediction.get("token_distributions") if with_distributions else None
    return Answer(
        prediction["actions"],
        prediction["normalized_actions"],
        prediction.get("token_probabilities"),
        distributions=None if distributions is None else distributions[..., ::-1],  # ids grow as numbers fall
    )


def dataset_of(model: "OpenVLAForActionPrediction", unnorm_key: str) -> Dataset:
    """What clients are told of a dataset of the model."""
    spec, mode = spec_of(model.norm_stats or {}, unnorm_key), model.normalization.get(unnorm_key, "bounds_q99")
    ends = np.repeat([[-1.0], [1.0]], spec.action_dim, axis=1)
    low, high = unnormalize_actions(ends, model.get_action_stats(unnorm_key), mode)
    stated = (model.norm_stats or {})[unnorm_key].get("action_spec") is not None and spec.stated
    return Dataset(spec, model.config.proprio_dim, tuple(low.tolist()), tuple(high.tolist()), stated)


@contextmanager
def memory_errors() -> Iterator[None]:
    """Errors of torch's allocators as a `MemoryError`."""
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error).lower() for words in OUT_OF_MEMORY):
            raise
        raise MemoryError(str(error)) from None
