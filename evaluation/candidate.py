"""Who acts in an evaluation: a model, of which nothing but files is read until it fits the environment, or what it is
measured against."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..action_spec import ActionSpec, spec_of
from ..action_tokenizer import get_action_stats, resolve_unnorm_key, scale_of
from ..configuration_openvla import OpenVLAConfig
from ..hub import config_of, file_digests, model_folder, statistics_of, variant_of
from ..options.evaluation import EvaluateOptions
from ..options.fields import decisive
from ..policy import OpenVLAPolicy, Policy, quantization_of
from .environment import (
    Environment,
    check_dimensions,
    check_state,
    dataset_of,
    has_other_rate,
    warn_of_other_units,
)
from .policies import ConstantPolicy, RandomPolicy


OF_A_LOADED_MODEL = ("unnorm_key", "dtype", "quantization", "decoding", "pixels", "action_head", "action_chunk")


@dataclass(frozen=True)
class Candidate:
    """The files of a model that was looked at beside an environment."""

    source: Path
    statistics: Mapping[str, Any]
    unnorm_key: str | None  # as given, or of several datasets that of the environment
    variant: Mapping[str, Any]  # what its files do not tell
    config: OpenVLAConfig
    digests: Mapping[str, str]
    recorded_hz: float | None  # where the environment takes another rate

    @classmethod
    def beside(cls, here: Environment, spec: ActionSpec, options: EvaluateOptions) -> "Candidate":
        """Units, and for a policy that is the model state and chunk as well, are those of the environment.

        Raises:
            ValueError: If they are not, or the folder of the evaluation is the model.
        """
        source, output = model_folder(options.model), Path(options.output).expanduser()
        if output.resolve() == source.resolve():
            raise ValueError(f"output='{output}' is the model: give a folder of its own, it may lie inside.")
        statistics, key = statistics_of(source), options.unnorm_key
        warn_of_other_units(here, statistics, key, options.model, options.env)
        if key is None and len(statistics) > 1:
            key = dataset_of(here, statistics)
        stats = get_action_stats(statistics, key)
        variant = variant_of(source, options.action_head, options.action_chunk)
        config = config_of(source, **variant)
        check_dimensions(stats, options.model, options.env, spec)
        recorded: float | None = spec_of(statistics, resolve_unnorm_key(statistics, key)).hz
        if not has_other_rate(recorded, here, options.model, options.env, "; --hz changes no action"):
            recorded = None
        if options.policy == "model":
            check_chunk(config.action_chunk, options)
            check_state(config.proprio_dim, options.model, options.env, here.state_names)
        digests = file_digests(source, weights=options.policy == "model")
        return cls(source, statistics, key, variant, config, digests, recorded)

    @property
    def resolved_key(self) -> str:
        return resolve_unnorm_key(self.statistics, self.unnorm_key)

    def load(self, options: EvaluateOptions, device: str) -> OpenVLAPolicy:
        """The model itself."""
        return OpenVLAPolicy.load(
            str(self.source),
            device=device,
            dtype=options.dtype,
            quantization=options.quantization,
            unnorm_key=self.unnorm_key,
            pixels=options.pixels,
            variant=self.variant,
            decoding=options.decoding or "mode",
        )

    def said(self, policy: OpenVLAPolicy) -> dict[str, Any]:
        """What the loaded model decided by itself, for the report."""
        said = {"unnorm_key": self.resolved_key, "dtype": str(policy.model.dtype).removeprefix("torch.")}
        stored = quantization_of(policy.model)
        said |= {"quantization": stored} if stored else {}
        return said | ({"action_chunk": self.config.action_chunk} if self.config.action_chunk > 1 else {})

    def reference(self, name: str) -> Policy:
        """ "random" or "mean" actions of the demonstrations, see `reference_policy`."""
        stats = get_action_stats(self.statistics, self.unnorm_key)
        return reference_policy(name, stats, self.config.normalization.get(self.resolved_key, "bounds_q99"))


def check_chunk(chunk: int, options: EvaluateOptions) -> None:
    """Raise a `ValueError` if more steps of an answer are to be executed than it holds; a way to use chunks where there
    are none is a warning."""
    if (options.execute or 1) > chunk:
        raise ValueError(
            f"execute={options.execute}: '{options.model}' predicts {chunk} step(s) at once, of which so many are "
            "executed at most."
        )
    if options.chunking is not None and chunk == 1:
        warnings.warn(
            f"chunking='{options.chunking}': '{options.model}' predicts one step at once, so that all ways are the "
            "same, and nothing is continued.",
            stacklevel=4,
        )


def check_own(policy: Policy, options: EvaluateOptions) -> None:
    """Raise a `ValueError` for options that a policy given as an object never sees: they would be in its report."""
    kind = type(policy).__name__
    known = decisive(EvaluateOptions)
    for name in OF_A_LOADED_MODEL:
        if (value := getattr(options, name)) != known[name]:
            raise ValueError(f"{name}={value!r}: the policy given ({kind}) acts as it is, leave it out.")
    if hex(id(policy)) in repr(policy):
        warnings.warn(
            f"policy={policy!r}: that is its place in memory, another one each time, so that an evaluation which is "
            f"stopped cannot be continued. Give {kind} a __repr__ that says what it is.",
            stacklevel=3,
        )


def reference_policy(name: str, stats: dict[str, Any], normalization: str) -> Policy:
    """What a policy has to be better than: random or mean actions of the demonstrations.

    Args:
        normalization: What -1 and 1 of the model stand for; random actions are drawn between.
    """
    if name == "random":
        return RandomPolicy(*scale_of(stats, normalization))
    return ConstantPolicy(np.asarray(stats["mean"]))
