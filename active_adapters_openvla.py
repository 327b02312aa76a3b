"""What counts in a prediction: units, prompt form, pixels and settings of the adapters that take part in it, or of the
base.
"""

import copy
import os
import warnings
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.utils import cached_file, is_peft_available

from .action_tokenizer import check_statistics, check_units
from .adapter_weights_openvla import AdapterWeights, with_adapter_name
from .adapters_openvla import (
    KEY,
    OF_MODEL,
    adapter_names,
    belongings,
    check_base,
    check_name,
    read_belongings,
    with_belongings,
)
from .configuration_openvla import TRANSFORMERS, plain_statistics
from .files_openvla import QUIET, local_folder
from .parts_openvla import PARTS, PARTS_FILE, asks_for_parts
from .processing_openvla import OpenVLAProcessor
from .processor_files_openvla import HUB_KWARGS, hub_options
from .quantization_openvla import has_quantized_layers, leave_blocks_unpacked


class AdapterBelongings(AdapterWeights):
    """Of a model: units, prompt form and pixels are those of the adapters that take part in a prediction, however they
    were added (`load_adapter`, `PeftModel`), chosen, disabled, deleted or merged; without one, those of the base.
    """

    config: Any
    action_head: Any
    load_parts: Any
    _processor: OpenVLAProcessor | None
    _processor_is_set: bool
    _adapted_processor: tuple[dict | None, OpenVLAProcessor | None]
    _source: str | None
    _hub_kwargs: dict[str, Any]

    @property
    def peft_config(self) -> dict[str, Any]:
        if "_peft_config" not in self.__dict__:
            raise AttributeError("The model has no adapters.")
        return self.__dict__["_peft_config"]

    @peft_config.setter
    def peft_config(self, value: dict[str, Any]) -> None:
        self.__dict__["_peft_config"] = value
        self._tuner_layers()
        leave_blocks_unpacked(self)  # type: ignore[arg-type]

    @peft_config.deleter
    def peft_config(self) -> None:
        if "_peft_config" not in self.__dict__:
            raise AttributeError("The model has no adapters.")
        self._settle()
        configs = self.__dict__.pop("_peft_config")
        # They tell what was merged when PEFT has taken them out.
        names = {name for layer in self.__dict__.pop("_known_tuner_layers", ()) for name in layer.merged_adapters}
        merged = [config for name, config in configs.items() if name in names]
        if not merged:
            return
        try:  # the base is now what they make of it
            for config in merged:
                self._check_adapter(config, configs)
            self.__dict__["_holds_merged"] = True
            self._check_parts(merged, configs)
            self.__dict__.pop("_parts_owner", None)
            statistics, self._merged_processor = _together(merged, "norm_stats"), _together(merged, "processor")
            for field in OF_MODEL:
                setattr(self.config, field, self._of_adapters(field, merged))
        except ValueError as error:
            warnings.warn(f"The merged model has no action statistics. {error}", stacklevel=3)
            self.config.norm_stats = None
            return
        if statistics is not None:
            self.config.norm_stats = statistics

    def load_adapter(self, peft_model_id=None, adapter_name=None, *args, **kwargs):
        """As in every model of the library: a PEFT adapter from a folder or Hub id. It brings the statistics, prompt
        form and pixels of its training, which count while it is active.

        Raises:
            ValueError: If the model has 8 or 4 bits (`openvla quantize`), to which nothing can be added.
        """
        if has_quantized_layers(self):
            raise ValueError(
                "An adapter is added to weights that are not rounded: load it on the base, merge it (`openvla merge "
                "RUN OUT`) and quantize the result (`openvla quantize OUT SMALLER`); or model.dequantize() first."
            )
        leave_blocks_unpacked(self)  # type: ignore[arg-type]  # DoRA reads weights while it is added
        name = adapter_name or "default"
        hub = hub_options(kwargs) | (kwargs.get("adapter_kwargs") or {})
        kwargs = {key: value for key, value in kwargs.items() if key not in HUB_KWARGS}
        kwargs["adapter_kwargs"] = hub  # the library takes them nowhere else
        folder = None if peft_model_id is None else local_folder(peft_model_id)
        if folder is not None and hub.get("subfolder"):
            peft_model_id = str(folder / hub.pop("subfolder"))  # transformers 5.4 looks only on the Hub into subfolders
        brought: dict[str, Any] = {}
        stored = kwargs.get("adapter_state_dict")
        if peft_model_id is not None:
            brought = read_belongings(peft_model_id, **hub)
            if stored is None:
                stored = adapter_names(peft_model_id, hub)
                if TRANSFORMERS < (5, 6) and is_peft_available():
                    kwargs["adapter_state_dict"] = stored = _read_weights(peft_model_id, hub)
            if brought.get("model"):
                parts = cached_file(peft_model_id, PARTS_FILE, **QUIET, **hub)
                self.load_parts(Path(parts).parent if parts else peft_model_id, brought["model"], owner=None)
        loaded = super().load_adapter(peft_model_id, adapter_name, *args, **kwargs)  # type: ignore[misc]
        if stored is not None:
            self._check_complete(name, with_adapter_name(stored, name))
        if "_parts_owner" in self.__dict__ and self.__dict__["_parts_owner"] is None:
            self.__dict__["_parts_owner"] = name
            for field in OF_MODEL:  # without it its parts predict nothing: the config says what they do
                setattr(self.config, field, copy.copy(brought["model"].get(field, getattr(self.config, field))))
        self._check_values(name)
        config = self.peft_config[name]
        config.auto_mapping = {**(config.auto_mapping or {}), KEY: brought}
        config._openvla_checked, config._openvla_loaded = False, True
        self._check_adapter(config)
        return loaded

    @property
    def norm_stats(self) -> dict | None:
        """Statistics of the training datasets (published name): of the adapters that are active and brought some, else
        of the base, where they are saved with the config."""
        own = self._adapter_statistics()
        return self.config.norm_stats if own is None else own

    @norm_stats.setter
    def norm_stats(self, value: dict | None) -> None:
        value = plain_statistics(value)
        active = [config for config in self._active_adapters() if belongings(config).keys() & {"norm_stats", "unknown"}]
        for config in active:
            brought = {**belongings(config), "norm_stats": value}
            check_units(brought.get("model", {}).get("normalization", {}), belongings(config).get("norm_stats"), value)
            brought.pop("unknown", None)
            config.auto_mapping = {**config.auto_mapping, KEY: brought}
        if not active:
            check_units(self.config.normalization, self.config.norm_stats, value)
            self.config.norm_stats = value

    @property
    def action_chunk(self) -> int:
        """Steps that one prediction is for, K: of an active adapter, else of the config."""
        return self._of_adapters("action_chunk", self._active_adapters())

    @property
    def camera_names(self) -> list[str]:
        """What the model sees: of an active adapter, else of the config."""
        return self._of_adapters("camera_names", self._active_adapters())

    @property
    def normalization(self) -> dict[str, str]:
        """Which statistics of a dataset -1 and 1 stand for: of an active adapter, else of the config."""
        return self._of_adapters("normalization", self._active_adapters())

    @property
    def constant_state(self) -> str:
        """What a number of the state becomes that never changed in training: of an active adapter, else of the
        config."""
        return self._of_adapters("constant_state", self._active_adapters())

    @property
    def prefix_training(self) -> int | None:
        """Steps of a chunk that the head learned to be given, at most: of an active adapter, else of the config; None
        where any number may be, as with tokens that follow one another."""
        return self._of_adapters("prefix_training", self._active_adapters()) if self.action_head.parallel else None

    @property
    def processor(self) -> OpenVLAProcessor:
        """The processor of the folder the model came from, loaded when first needed, with the pixels and prompt form of
        an active adapter; may be set."""
        if self._processor is None:
            source = self._source or self.config.name_or_path
            if not source:
                raise ValueError(
                    "The model was made from a config and knows no processor: set model.processor = "
                    "OpenVLAProcessor.from_pretrained(folder)."
                )
            processor = OpenVLAProcessor.from_pretrained(source, **self._hub_kwargs)
            processor.check_fits(self.config)
            self._processor = processor
        if self._processor_is_set:
            self._processor.camera_names = list(self.camera_names)
            return self._processor
        brought = self._adapter_processor()
        if brought != self._adapted_processor[0]:
            processor = with_belongings(self._processor, brought)
            processor.check_fits(self.config)
            self._adapted_processor = brought, processor
        processor = self._adapted_processor[1] or self._processor
        processor.camera_names = list(self.camera_names)
        return processor

    @processor.setter
    def processor(self, value: OpenVLAProcessor) -> None:
        if not hasattr(value, "check_fits"):  # by name: that of a Hub folder's own code is another class
            raise ValueError(f"model.processor is an OpenVLAProcessor, got {type(value).__name__}.")
        value.check_fits(self.config)
        self._processor, self._processor_is_set = value, True

    def _active_adapters(self) -> list[Any]:
        """Configurations of the adapters that take part in a prediction."""
        configs = self.__dict__.get("_peft_config")
        if not configs:
            return []
        layers = self._tuner_layers()
        if not layers:  # unloaded; older PEFT leaves the configurations there
            del self.peft_config
            return []
        self._settle()
        names = {name for layer in layers for name in _at_work(layer)}
        return [config for name, config in configs.items() if name in names]

    def _adapter_statistics(self) -> dict[str, Any] | None:
        """Statistics of the active adapters together; None where those of the base count.

        Raises:
            ValueError: If they cannot be acted on, are not known, or differ between adapters for one dataset.
        """
        active = self._active_adapters()
        for config in active:
            self._check_adapter(config)
        self._check_parts(active, self.__dict__.get("_peft_config") or {})
        return _together(active, "norm_stats")

    def _adapter_processor(self) -> dict[str, Any] | None:
        return _together(self._active_adapters(), "processor") or self.__dict__.get("_merged_processor")

    def _of_adapters(self, field: str, configs: Iterable[Any]) -> Any:
        """A field of the configuration of a model with these adapters; that of the base where they say nothing."""
        base = getattr(self.config, field)
        values = [belongings(config).get("model", {}).get(field, base) for config in configs] or [base]
        if any(value != values[0] for value in values):
            raise ValueError(
                f"Adapters that are active together differ in {field} ({', '.join(map(str, values))}): activate one of "
                "them (set_adapter)."
            )
        return values[0]

    def _check_parts(self, active: Collection[Any], configs: Mapping[str, Any]) -> None:
        """Raise a `ValueError` if the added parts (`load_parts`) are those of an adapter that is not active: one that
        is disabled, deleted, or had them before another one brought its own."""
        if "_parts_owner" not in self.__dict__:
            return
        name = self.__dict__["_parts_owner"] or "that could not be loaded"
        if not any(config is configs.get(name) for config in active):
            raise ValueError(
                f"Head, state projector or FiLM of the model came with the adapter '{name}', which is not active: "
                "activate it (set_adapter, enable_adapters), or load the base, or the other adapter, by itself."
            )

    def _check_known(self, config: Any, configs: Mapping[str, Any] | None = None) -> None:
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
            if wanted.get(field, own := getattr(self.config, field)) != own:
                raise ValueError(
                    f"The adapter was trained with {field}={wanted[field]!r}, the model has {own!r}: PEFT loads no "
                    "weights of added parts. Load both with OpenVLAForActionPrediction.from_pretrained(RUN), or the "
                    "adapter with model.load_adapter(RUN)."
                )
        configs = self.__dict__.get("_peft_config") or {} if configs is None else configs
        if asks_for_parts(wanted) and configs.get(self.__dict__.get("_parts_owner") or "") is not config:
            raise ValueError(
                "The adapter was trained with a head, state projector or FiLM of its own, and those of the model are "
                "not its: PEFT loads no weights of added parts, and a model has those of one adapter. Load the adapter "
                "(again) with model.load_adapter(RUN), or both with OpenVLAForActionPrediction.from_pretrained(RUN)."
            )

    def _check_adapter(self, config: Any, configs: Mapping[str, Any] | None = None) -> None:
        """Raise a `ValueError` if the units of an adapter are not known; warn once if nothing is known of its training,
        or it had another base."""
        self._check_known(config, configs)
        if getattr(config, "_openvla_checked", False):
            return
        config._openvla_checked = True
        brought = belongings(config)
        if "norm_stats" in brought:
            check_statistics(brought["norm_stats"], "the statistics of the adapter")
        elif config.inference_mode:  # not one that has just been made, to be trained
            datasets = ", ".join(list(self.config.norm_stats or {})[:3]) or "none"
            warnings.warn(
                "The adapter came without action statistics (dataset_statistics.json): actions are in the units of its "
                f"base ({datasets}). If it was trained on other data, put that file into its folder and use "
                "model.load_adapter(folder), or set the norm_stats of the base model.",
                stacklevel=3,
            )
        if problem := self._problem_of_base(config):
            warnings.warn(f"{problem}.", stacklevel=3)

    def _problem_of_base(self, config: Any) -> str | None:
        """What is wrong, or cannot be told, if an adapter was trained on other weights; None of one just made."""
        base, digest = self.config.name_or_path, belongings(config).get("base_digest")
        if not base or not (digest or config.inference_mode):
            return None
        if "_holds_merged" in self.__dict__:
            return (
                f"An adapter was merged into the weights of '{base}' before, and nothing tells whether this one was "
                "trained on what came of it: if not, load the base again, and this adapter alone"
            )
        return check_base(base, digest) if digest else check_name(base, config.base_model_name_or_path)


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


def _read_weights(adapter: str | os.PathLike, hub: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The weights of an adapter: transformers 5.4 and 5.5 find them only under "model." and leave all others random."""
    from peft.utils import load_peft_weights

    weights = load_peft_weights(adapter, device="cpu", **hub_options(hub))
    return {name.removeprefix("base_model.model."): weight for name, weight in weights.items()}


__all__ = ["AdapterBelongings"]
