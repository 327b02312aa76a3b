"""What a model knows of its adapters (PEFT) beside their weights: which there are, which take part in a prediction,
whether what they say of their training holds, and what is left of those that were merged.
"""

import warnings
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from .action_tokenizer import check_statistics
from .adapters_openvla import KEY, OF_MODEL, belongings, check_base, check_name, with_belongings
from .configuration_openvla import OpenVLAConfig
from .modules_openvla import modules_of
from .parts_openvla import PARTS, asks_for_parts
from .processing_openvla import OpenVLAProcessor


@dataclass(eq=False)
class AdapterState:
    """Of one model, which it does not hold: its configuration is given where it is needed, as `base`.

    Attributes:
        configs: `PeftConfig` by name, as PEFT keeps them; None: it has put none into the model.
        layers: Layers of adapters as they were last found. They tell what was merged when PEFT has taken them out.
        parts_owner: Name of the adapter that brought the added parts (`ModelParts.load_parts`), "" until it is loaded;
            None: they are the model's own.
        holds_merged: Whether adapters are merged into the weights and gone.
        merged_processor: What these brought of a processor.
        adapted_processor: The last processor with what adapters brought, and what that was.
    """

    configs: dict[str, Any] | None = None
    layers: tuple[Any, ...] = ()
    parts_owner: str | None = None
    holds_merged: bool = False
    merged_processor: dict[str, Any] | None = None
    adapted_processor: tuple[dict | None, OpenVLAProcessor | None] = (None, None)

    # Which there are --------------------------------------------------------------------------------------------------

    def find_layers(self, model: Any) -> list[Any]:
        """Layers of adapters in the model now."""
        layers = [module for module in modules_of(model).below if hasattr(type(module), "merged_adapters")]
        self.layers = tuple(layers) or self.layers
        return layers

    def active(self) -> list[Any]:
        """Configurations of the adapters that take part in a prediction, by the layers found last."""
        self.settle()
        names = {name for layer in self.layers for name in _at_work(layer)}
        return [config for name, config in (self.configs or {}).items() if name in names]

    def settle(self, before_loading: bool = False) -> None:
        """Find the adapters that were made of others: their configuration is a copy, and its weights were not loaded.
        They keep what it says only where all others say the same.

        Args:
            before_loading: Adapters may be there whose weights come next.
        """
        configs = self.configs or {}
        for name, config in configs.items():
            others = [other for other in configs.values() if other is not config]
            shared = any(other.auto_mapping is config.auto_mapping for other in others)
            copied = shared or (config.inference_mode and not before_loading)
            made = copied and not getattr(config, "_openvla_loaded", False)
            if not made or not belongings(config):
                continue
            known = {belongings(each).get("base_digest") for each in (config, *others)} - {None}
            if not others or any(_meaning(other) != _meaning(config) for other in others) or len(known) > 1:
                forget(
                    config,
                    f"The adapter '{name}' was made of others: their units, settings or bases differ, or are gone",
                )
            config.auto_mapping, config._openvla_loaded = dict(config.auto_mapping), True

    def take_out(self, base: OpenVLAConfig) -> None:
        """PEFT has taken its layers out: what they were merged into is the base now, with what they brought."""
        self.settle()
        names = {name for layer in self.layers for name in layer.merged_adapters}
        merged = [config for name, config in (self.configs or {}).items() if name in names]
        try:
            if merged:
                self._become(merged, base)
        except ValueError as error:
            warnings.warn(f"The merged model has no action statistics. {error}", stacklevel=4)
            base.norm_stats = None
        finally:
            self.configs, self.layers = None, ()

    def _become(self, merged: Collection[Any], base: OpenVLAConfig) -> None:
        for config in merged:
            self.check(config, base)
        self.holds_merged = True
        self.check_parts(merged)
        self.parts_owner = None
        statistics, self.merged_processor = _together(merged, "norm_stats"), _together(merged, "processor")
        for field in OF_MODEL:
            setattr(base, field, of_adapters(field, merged, base))
        if statistics is not None:
            base.norm_stats = statistics

    # What the active ones brought -------------------------------------------------------------------------------------

    def statistics(self, active: Collection[Any], base: OpenVLAConfig) -> dict[str, Any] | None:
        """Those of the active adapters together; None where those of the base count.

        Raises:
            ValueError: If they cannot be acted on, are not known, or differ between adapters for one dataset.
        """
        for config in active:
            self.check(config, base)
        self.check_parts(active)
        return _together(active, "norm_stats")

    def processor(self, active: Iterable[Any], plain: OpenVLAProcessor, base: OpenVLAConfig) -> OpenVLAProcessor:
        """`plain` with the pixels and the prompt form of the active adapters, or of those that were merged."""
        brought = _together(active, "processor") or self.merged_processor
        if brought != self.adapted_processor[0]:
            adapted = with_belongings(plain, brought)
            adapted.check_fits(base)
            self.adapted_processor = brought, adapted
        return self.adapted_processor[1] or plain

    # Whether it holds -------------------------------------------------------------------------------------------------

    def check(self, config: Any, base: OpenVLAConfig) -> None:
        """Raise a `ValueError` if the units of an adapter are not known; warn once if nothing is known of its training,
        or it had another base."""
        self.check_known(config, base)
        if getattr(config, "_openvla_checked", False):
            return
        config._openvla_checked = True
        brought = belongings(config)
        if "norm_stats" in brought:
            check_statistics(brought["norm_stats"], "the statistics of the adapter")
        elif config.inference_mode:  # not one that has just been made, to be trained
            datasets = ", ".join(list(base.norm_stats or {})[:3]) or "none"
            warnings.warn(
                "The adapter came without action statistics (dataset_statistics.json): actions are in the units of its "
                f"base ({datasets}). If it was trained on other data, put that file into its folder and use "
                "model.load_adapter(folder), or set the norm_stats of the base model.",
                stacklevel=3,
            )
        if problem := self.problem_of_base(config, base):
            warnings.warn(f"{problem}.", stacklevel=3)

    def check_known(self, config: Any, base: OpenVLAConfig) -> None:
        """Raise a `ValueError` if the units of an adapter are not known, or parts it was trained with are missing."""
        if why := belongings(config).get("unknown"):
            raise ValueError(
                f"{why}, so the units of its actions are not known: load an adapter under a name of its own, or say "
                "them while it is active, model.norm_stats = {dataset: {'action': {'q01': [...], 'q99': [...]}}} (in "
                "PEFT model.get_base_model().norm_stats = ...)."
            )
        if getattr(config, "alora_invocation_tokens", None):
            raise ValueError(
                "The adapter is an activated LoRA (alora_invocation_tokens): PEFT lets it act behind certain tokens of "
                "a prompt, which it finds in forward and generate alone, and a prediction would be that of the base. "
                "Train a LoRA without them."
            )
        wanted = belongings(config).get("model", {})
        for field in PARTS:
            if wanted.get(field, own := getattr(base, field)) != own:
                raise ValueError(
                    f"The adapter was trained with {field}={wanted[field]!r}, the model has {own!r}: PEFT loads no "
                    "weights of added parts. Load both with OpenVLAForActionPrediction.from_pretrained(RUN), or the "
                    "adapter with model.load_adapter(RUN)."
                )
        if asks_for_parts(wanted) and (self.configs or {}).get(self.parts_owner or "") is not config:
            raise ValueError(
                "The adapter was trained with a head, state projector or FiLM of its own, and those of the model are "
                "not its: PEFT loads no weights of added parts, and a model has those of one adapter. Load the adapter "
                "(again) with model.load_adapter(RUN), or both with OpenVLAForActionPrediction.from_pretrained(RUN)."
            )

    def check_parts(self, active: Collection[Any]) -> None:
        """Raise a `ValueError` if the added parts are those of an adapter that is not active: one that is disabled,
        deleted, or had them before another one brought its own."""
        if self.parts_owner is None:
            return
        owner = (self.configs or {}).get(self.parts_owner)
        if not any(config is owner for config in active):
            raise ValueError(
                "Head, state projector or FiLM of the model came with the adapter "
                f"'{self.parts_owner or 'that could not be loaded'}', which is not active: activate it (set_adapter, "
                "enable_adapters), or load the base, or the other adapter, by itself."
            )

    def problem_of_base(self, config: Any, base: OpenVLAConfig) -> str | None:
        """What is wrong, or cannot be told, if an adapter was trained on other weights; None of one just made."""
        name, digest = base.name_or_path, belongings(config).get("base_digest")
        if not name or not (digest or config.inference_mode):
            return None
        if self.holds_merged:
            return (
                f"An adapter was merged into the weights of '{name}' before, and nothing tells whether this one was "
                "trained on what came of it: if not, load the base again, and this adapter alone"
            )
        return check_base(name, digest) if digest else check_name(name, config.base_model_name_or_path)

    def disown(self, name: str, why: str) -> None:
        """Weights were loaded for an adapter that are not its own, or have no values: its units are not known."""
        config = (self.configs or {})[name]
        forget(config, why)
        config._openvla_loaded = True


def forget(config: Any, why: str) -> None:
    """Let a configuration say that its units are not known, also where it is saved."""
    config.auto_mapping = {**(config.auto_mapping or {}), KEY: {"unknown": why}}


def of_adapters(field: str, configs: Iterable[Any], base: OpenVLAConfig) -> Any:
    """A field of the configuration of a model with these adapters; that of the base where they say nothing."""
    own = getattr(base, field)
    values = [belongings(config).get("model", {}).get(field, own) for config in configs] or [own]
    if any(value != values[0] for value in values):
        raise ValueError(
            f"Adapters that are active together differ in {field} ({', '.join(map(str, values))}): activate one of "
            "them (set_adapter)."
        )
    return values[0]


def _at_work(layer: Any) -> list[str]:
    """Names of the adapters whose weights a layer computes with."""
    if layer.disable_adapters:
        return []
    if layer.merged_adapters:
        return layer.merged_adapters
    own = {name for kind in layer.adapter_layer_names for name in getattr(layer, kind, ())}
    return [name for name in layer.active_adapters if name in own]


def _together(configs: Iterable[Any], what: str) -> Any:
    """What several adapters brought, None if nothing. Raises a `ValueError` where they contradict each other."""
    found: dict[str, Any] = {}
    for brought in (belongings(config).get(what) for config in configs):
        for key, value in (brought or {}).items():
            if found.setdefault(key, value) != value:
                raise ValueError(
                    f"Adapters that are active together differ in {what}, '{key}': activate one of them (set_adapter)."
                )
    return found or None


def _meaning(config: Any) -> list[Any]:
    brought = belongings(config)
    return [brought.get(name) for name in ("norm_stats", "processor", "model")]


__all__ = ["AdapterState", "forget", "of_adapters"]
