"""What acts: the protocol of a policy, an OpenVLA model as one, and checks of the numbers that a policy gives.

Light to import: the libraries of a model are loaded with it.
"""

import inspect
import numbers
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .action_spec import spec_of
from .action_tokenizer import check_state_of_one, resolve_unnorm_key, units_of, unnormalize_actions
from .cameras_openvla import find_cameras, order_cameras
from .choices_openvla import check_choice
from .device import emulated, rounds_products
from .extras import require
from .observation import Observation
from .pixels_openvla import PIXELS


if TYPE_CHECKING:
    from .modeling_openvla import OpenVLAForActionPrediction


DECODING = ("mode", "mean")
FARTHEST = 100.0  # numbers of an action beyond it are those of another unit, or of a policy that has gone wrong
# Name -> `quantization_config` of `from_pretrained`; names with bnb- are of bitsandbytes.
QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "int8": {"quant_method": "openvla", "bits": 8},
    "int4": {"quant_method": "openvla", "bits": 4},
    "fp8": {"quant_method": "openvla", "bits": "fp8"},
    "bnb-int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "bnb-nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
}


class Policy(Protocol):
    """Observations in, actions out; for several episodes at once. One that continues committed actions says how many
    steps its answers hold, `action_chunk`."""

    def reset(self, slot: int = 0) -> None:
        """An episode begins in `slot`: forget what was kept of the one before. Here: nothing was."""
        return None

    def act(self, observations: Sequence[Observation]) -> np.ndarray:
        """(N, A) actions in the units of the environment; or (N, K, A), K for each to be executed one after another."""
        ...


def begin_episode(policy: Policy, slot: int = 0) -> None:
    """Tell a policy that an episode begins in `slot`, if it asks for that: one that keeps nothing needs no `reset`.

    Raises:
        ValueError: If its `reset` takes no slot: what it keeps would be of several episodes.
    """
    if not hasattr(policy, "reset"):
        return
    try:
        inspect.signature(policy.reset).bind(slot)
    except TypeError as error:
        raise ValueError(
            f"reset of {type(policy).__name__}: {error}. Expected reset(slot): several episodes run side by side, and "
            "what a policy keeps of one, it keeps by slot."
        ) from error
    policy.reset(slot)


def chunk_of(policy: Policy | None) -> int:
    """Steps that one answer of a policy holds, as it says; a `ValueError` if it says something else."""
    chunk = getattr(policy, "action_chunk", 1)
    if not isinstance(chunk, numbers.Integral) or isinstance(chunk, bool) or chunk < 1:
        kind = type(policy).__name__
        raise ValueError(f"action_chunk={chunk!r:.100} of {kind}: expected the steps of an answer, at least 1.")
    return int(chunk)


class OpenVLAPolicy(Policy):
    """A model in control. It is shown what is stored with it, by its own processor.

    Args:
        unnorm_key: Dataset in whose units actions are. May be left out where the model knows only one.
        crop: Of version 0.1.0: show the model images resized with lanczos3, and the middle of them or not, instead of
            what is stored with it; this policy alone does. Today: `pixels` of `load`.
        camera: Which image of the observation it sees. Default: as `camera_names` of the model say.
        drafts: Let the tokens of the last prediction of an episode ride along with the next one, the steps of a chunk
            that were executed taken off (`step` of the observations; not given: all were). What is chosen again costs
            no pass of its own, and in float32 nothing is chosen otherwise. Before the first one all are guessed.
            Default: in float32 only; what half precision, quantization and TF32 round depends a little on what is read
            together.
        decoding: What becomes of the distribution that the head has for each number of an action. "mode": the most
            probable bin, as published. "mean": the mean of all bins, of numbers that are scaled; a gripper, and an
            angle that is a place and jumps at half a turn, stay the most probable one. Smoother, and steadier where
            answers come late; between two ways that are as good it is neither. Tokens and their probabilities stay
            those of the most probable bins. Of heads that choose token by token.

    Attributes:
        passes: Of the language model, for each observation of the last `act`; empty where the head counts none.

    Raises:
        KeyError: If `unnorm_key` is unknown.
        ValueError: If the head has no distributions for `decoding`, or an option is no such value.
    """

    def __init__(
        self,
        model: "OpenVLAForActionPrediction",
        unnorm_key: str | None = None,
        camera: str | None = None,
        crop: bool | None = None,
        drafts: bool | None = None,
        decoding: str = "mode",
    ):
        check_choice("decoding", decoding, DECODING)
        for name, value in (("crop", crop), ("drafts", drafts)):
            if not (value is None or isinstance(value, (bool, np.bool_))):  # any text would be yes
                raise ValueError(f"{name}={value!r:.100}: expected True, False or None.")
        if decoding == "mean" and not getattr(getattr(model, "action_head", None), "takes_drafts", False):
            raise ValueError("decoding='mean': this head chooses no tokens one after the other, leave it out.")
        self.model, self.camera, self.drafts, self.decoding = model, camera, drafts, decoding
        self.passes: list[int] = []
        self._last: dict[int, tuple[int | None, np.ndarray]] = {}  # slot -> step and tokens (K, A) of its prediction
        self.crop = crop
        self.unnorm_key = resolve_unnorm_key(model.norm_stats, unnorm_key)

    @classmethod
    def load(
        cls,
        model: str,
        *,
        device: str = "cpu",
        dtype: str = "auto",
        quantization: str | None = None,
        pixels: str | None = None,
        variant: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> "OpenVLAPolicy":
        """From a folder or Hub id; `options` of the class.

        Args:
            quantization: One of `QUANTIZATIONS`, see `load_model`.
            pixels: "published", "libero" or "oft", see `PIXELS`. Default: as stored with the model.
            variant: What the folder does not tell, of a model of OpenVLA-OFT, see `from_pretrained`: `action_head`,
                `action_chunk`.
        """
        if pixels is not None:
            check_choice("pixels", pixels, PIXELS)
            if options.get("crop") is not None:
                raise ValueError(f"pixels='{pixels}' beside crop={options['crop']}: both say what is shown, give one.")
        loaded = load_model(model, device=device, dtype=dtype, quantization=quantization, **(variant or {}))
        policy = cls(loaded, **options)
        if loaded.device.type == "cpu":
            from .graphs_openvla import order_weights

            order_weights(loaded)
        if pixels is not None:
            policy.model.processor = policy.model.processor.with_pixels(**PIXELS[pixels])
        return policy

    @property
    def action_chunk(self) -> int:
        """Steps that one answer holds."""
        return getattr(getattr(self.model, "config", None), "action_chunk", 1)

    def reset(self, slot: int = 0) -> None:
        """An episode begins in `slot`: its draft is forgotten."""
        self._last.pop(slot, None)

    def act(self, observations: Sequence[Observation]) -> np.ndarray:
        """(N, A) actions in the units of `unnorm_key`, or (N, K, A) of a model that predicts K steps.

        Raises:
            ValueError: If there is no observation, or one holds no image, or not that of the camera.
        """
        check_observations(observations)
        if not len(observations):
            raise ValueError("observations is empty: give one for each robot.")
        found = self.predict(observations)
        counted = all("token_passes" in prediction for prediction in found)
        self.passes = [int(prediction["token_passes"].max()) for prediction in found] if counted else []
        actions = np.stack([prediction["actions"] for prediction in found])
        return actions[:, 0] if actions.shape[1] == 1 else actions

    def predict(
        self, observations: Sequence[Observation], unnorm_keys: Sequence[str] | None = None, **options: Any
    ) -> list[dict[str, np.ndarray]]:
        """What `ActionPrediction` holds, for each observation: arrays (K, A, ...), K = 1 of a model that predicts one
        step.

        Args:
            unnorm_keys: Dataset of each. Default: that of the policy.
            options: Of `predict_action`.

        Raises:
            ValueError: As `act`.
        """
        check_observations(observations)
        keys = [self.unnorm_key] * len(observations) if unnorm_keys is None else unnorm_keys
        if isinstance(keys, str) or len(keys) != len(observations):
            raise ValueError(f"unnorm_keys={keys!r}: expected one for each of {len(observations)} observations.")
        batches: dict[tuple[str, int], list[int]] = {}  # one for each dataset and number of steps decided already
        for row, (seen, key) in enumerate(zip(observations, keys, strict=True)):
            batches.setdefault((key, 0 if seen.committed is None else len(seen.committed)), []).append(row)
        predictions: dict[int, dict[str, np.ndarray]] = {}
        for (key, _), rows in batches.items():
            found = self._predict([observations[row] for row in rows], unnorm_key=key, **options)
            for place, row in enumerate(rows):
                predictions[row] = {name: values[place] for name, values in found.items()}
        return [predictions[row] for row in range(len(observations))]

    def _predict(self, observations: Sequence[Observation], **more: Any) -> dict[str, np.ndarray]:
        """A prediction of one batch, (batch, K, A, ...) each; of a model that has no heads the actions alone."""
        if (proprio_dim := getattr(getattr(self.model, "config", None), "proprio_dim", None)) is not None:
            for observation in observations:
                check_state_of_one(observation.state, proprio_dim)
            more["state"] = np.stack([observation.state for observation in observations])
        if observations[0].committed is not None and len(observations[0].committed):
            more["committed"] = np.stack([observation.committed for observation in observations])  # type: ignore[misc]
        images = [self._images(observation) for observation in observations]
        instructions = [observation.instruction for observation in observations]
        asked: tuple[Any, ...] = (images, instructions)
        if self.crop is not None:
            asked, more = (), {**self._cropped(images, instructions), **more}
        head = getattr(self.model, "action_head", None)
        if head is None:
            actions = np.asarray(self.model.predict_action(*asked, **more))
            return {"actions": actions.reshape(len(observations), -1, actions.shape[-1])}
        sampled = more.get("do_sample")
        if sampled is None:
            sampled = getattr(more.get("generation_config"), "do_sample", None)
        if head.takes_drafts and not sampled and (self.drafts or (self.drafts is None and self._is_exact())):
            more.setdefault("draft", [self._draft(observation) for observation in observations])
        if self.decoding == "mean":
            if sampled or more.get("constrained") not in (None, True):
                asked_for = "do_sample=True" if sampled else "constrained=False"
                raise ValueError(
                    f"{asked_for} with decoding='mean': a mean is of all action tokens, and nothing is drawn; leave "
                    "one of them out."
                )
            more["return_distributions"] = True
        found: Any = self.model.predict_action(*asked, return_dict=True, **more)
        shape = (len(observations), -1, found.actions.shape[-1])
        rows = {name: values.reshape(*shape, *values.shape[found.actions.ndim :]) for name, values in found.items()}
        if head.takes_drafts and "token_ids" in rows:  # heads of a user's own may tell no tokens
            for observation, tokens in zip(observations, rows["token_ids"]):
                self._last[observation.slot] = (observation.step, tokens.copy())  # callers may write into theirs
        if self.decoding == "mean":
            decided = 0 if observations[0].committed is None else len(observations[0].committed)
            self._take_means(rows, more["unnorm_key"], decided)
        return rows

    def _cropped(self, images: list[Any], instructions: list[str]) -> dict[str, Any]:
        """Model inputs with the pixels of `crop`: the processor of the model, which others act with, stays as it is."""
        from .inputs_openvla import process_raw
        from .stages_openvla import stage

        processor = self.model.processor.with_pixels("lanczos3", 0.9 if self.crop else None)
        with stage("preprocessing"):
            _, inputs = process_raw(processor, images, instructions)
        return {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}

    def _take_means(self, rows: dict[str, np.ndarray], unnorm_key: str, decided: int) -> None:
        """Replace actions (batch, K, A) after those that were decided already by means, see `decoding`."""
        model, statistics = self.model, self.model.norm_stats or {}
        tokenizer, stats = model.action_head.tokenizer, model.get_action_stats(unnorm_key)
        shares = rows["token_distributions"].astype(np.float64)
        means = shares @ tokenizer.decode(np.arange(*tokenizer.token_range)) / shares.sum(axis=-1)
        [mode] = units_of(model.normalization, statistics, [unnorm_key])
        takes = np.zeros(means.shape, dtype=bool)
        takes[:, decided:] = stats.get("mask", True)
        spec = spec_of(statistics, unnorm_key)
        takes[..., [*spec.grippers, *spec.absolute_angles]] = False
        actions = unnormalize_actions(means, stats, mode, model.action_head.margin)
        rows["normalized_actions"] = np.where(takes, means, rows["normalized_actions"])
        rows["actions"] = np.where(takes, actions, rows["actions"])

    def _is_exact(self) -> bool:
        """Whether the model rounds so little that a draft changes nothing."""
        import torch

        reads: Any = getattr(self.model, "language_model", self.model)  # a draft; other parts may have other types
        if reads.dtype != torch.float32 or getattr(self.model, "is_quantized", False):
            return False
        device = self.model.device.type
        return not (torch.is_autocast_enabled(device) or rounds_products(device))

    def _draft(self, observation: Observation) -> np.ndarray:
        """(K, A) tokens of the last prediction of its episode from the step of `observation` on, the last step
        repeated. Before the first it holds none, and the model guesses all of them."""
        nothing = np.zeros(0, np.int64)
        if observation.slot not in self._last:
            return nothing
        step, tokens = self._last[observation.slot]
        executed = len(tokens) if step is None or observation.step is None else observation.step - step
        if executed < 0:  # another episode, of which nobody told
            return nothing
        return tokens[np.minimum(np.arange(len(tokens)) + executed, len(tokens) - 1)]

    def _images(self, observation: Observation) -> Mapping[str, np.ndarray]:
        """Images by the names that the model has for its cameras; only that of `camera` where one was given."""
        images = observation.images
        if self.camera is not None and self.camera not in images:
            raise ValueError(f"No camera '{self.camera}' in the observation; there are {', '.join(images)}.")
        if not images:
            raise ValueError("The observation holds no image: OpenVLA acts on what it sees.")
        seen = getattr(self.model, "camera_names", None)
        if self.camera is not None:  # chosen, so that it is what the model sees, whatever its name
            return {seen[0] if seen and len(seen) == 1 else self.camera: images[self.camera]}
        if seen is None:
            return images
        found = find_cameras(order_cameras(list(images)), seen)  # in the order of data sets, whatever the simulator's
        return {view: images[camera] for view, camera in zip(seen, found)}


def load_model(
    model: str | os.PathLike,
    *,
    device: str = "cpu",
    dtype: str = "auto",
    quantization: str | None = None,
    **variant: Any,
) -> "OpenVLAForActionPrediction":
    """A model from a folder or Hub id, on a device and ready to predict.

    Args:
        dtype: "auto": as the weights are stored.
        quantization: Of the language model, rounded while it is read. "int8": fast on a CPU; "int4": small; "fp8": fast
            on a GPU that multiplies such; "bnb-int8" and "bnb-nf4": those of bitsandbytes. None: as the folder
            says.
        variant: What the folder does not tell, of a model of OpenVLA-OFT, see `from_pretrained`.

    Raises:
        ModuleNotFoundError: If a library of the quantization is missing.
        ValueError: If the folder is quantized already, in another way.
    """
    from .modeling_openvla import OpenVLAForActionPrediction

    loading: dict[str, Any] = {**variant, "dtype": dtype}
    if quantization is not None:
        check_choice("quantization", quantization, QUANTIZATIONS)
        loading["quantization_config"] = dict(QUANTIZATIONS[quantization])
    if quantization is None or not quantization.startswith("bnb-"):
        # Not by `device_map`, which needs accelerate.
        loaded = OpenVLAForActionPrediction.from_pretrained(model, **loading).to(device).eval()
        if reason := emulated(device, loaded.dtype):
            warnings.warn(f"{reason[0].upper()}{reason[1:]}: give dtype=float32.", stacklevel=2)
        return loaded
    require("bitsandbytes", "accelerate", purpose=f"quantization='{quantization}'", preferred="quant")
    return OpenVLAForActionPrediction.from_pretrained(model, device_map={"": device}, **loading).eval()


def quantization_of(model: Any) -> str | None:
    """What `quantization` a loaded model has, asked for or stored so: one of `QUANTIZATIONS`, or its method; None where
    its weights are plain."""
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return None
    fields = config if isinstance(config, Mapping) else config.to_dict()
    names = [name for name, asked in QUANTIZATIONS.items() if asked.items() <= fields.items()]
    return names[0] if names else str(fields["quant_method"])


def check_observations(observations: Any) -> None:
    """Raise a `ValueError` if it is no list of observations, or one of them holds no images by camera, or a step that
    is none."""
    if not isinstance(observations, Sequence):
        kind = type(observations).__name__
        raise ValueError(f"observations is of type {kind}: expected a list of Observation, one for each robot.")
    for row, observation in enumerate(observations):
        if not isinstance(images := getattr(observation, "images", None), Mapping):
            wrong = f"images of type {type(images).__name__}" if hasattr(observation, "images") else "no images"
            raise ValueError(
                f"observations[{row}] of type {type(observation).__name__} has {wrong}: expected an Observation with "
                "{camera: (H, W, 3) uint8}."
            )
        step = getattr(observation, "step", None)
        whole = isinstance(step, numbers.Integral) and not isinstance(step, (bool, np.bool_))
        if step is not None and not (whole and step >= 0):
            raise ValueError(
                f"observations[{row}].step={step!r:.100}: expected a whole number of steps since the episode began, or "
                "None where they are not counted."
            )


# Checks of actions ----------------------------------------------------------------------------------------------------


def check_numbers(actions: Any, expected: str = "finite numbers") -> np.ndarray:
    """Actions of any shape as finite float64 numbers; a `ValueError` for anything else."""
    try:
        given = np.asarray(actions)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged lists; tensors of a GPU, with gradients, bfloat16
        raise ValueError(f"action of type {type(actions).__name__}: expected {expected} ({error}).") from error
    if given.dtype.kind not in "fiub" or not np.isfinite(given).all():
        raise ValueError(f"action={given.tolist()}: expected {expected}.")
    return given.astype(np.float64)


def check_reach(actions: np.ndarray) -> np.ndarray:
    """`actions` as they are; a `ValueError` if one is beyond `FARTHEST`."""
    if (abs(actions) > FARTHEST).any():
        raise ValueError(
            f"action={actions.tolist()}: expected numbers within {FARTHEST:g} of 0, where 1 is the most that an arm "
            "does in a step. Are they in other units (wrong unnorm_key or statistics)?"
        )
    return actions
