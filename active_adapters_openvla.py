"""What counts in a prediction: units, prompt form, pixels and settings of the adapters that take part in it, or of the
base.
"""

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.utils import cached_file, is_peft_available

from .action_tokenizer import check_units
from .adapter_state_openvla import of_adapters
from .adapter_weights_openvla import AdapterWeights, with_adapter_name
from .adapters_openvla import KEY, OF_MODEL, adapter_names, belongings, read_belongings
from .configuration_openvla import TRANSFORMERS, plain_statistics
from .files_openvla import QUIET, local_folder
from .modules_openvla import COMPILED, uncompiled
from .parts_openvla import PARTS_FILE
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
    _source: str | None
    _hub_kwargs: dict[str, Any]

    @property
    def peft_config(self) -> dict[str, Any]:
        if self.adapter_state.configs is None:
            raise AttributeError("The model has no adapters.")
        return self.adapter_state.configs

    @peft_config.setter
    def peft_config(self, value: dict[str, Any]) -> None:
        self.adapter_state.configs = value
        self.adapter_state.find_layers(self)
        leave_blocks_unpacked(self)  # type: ignore[arg-type]

    @peft_config.deleter
    def peft_config(self) -> None:
        if self.adapter_state.configs is None:
            raise AttributeError("The model has no adapters.")
        self.adapter_state.take_out(self.config)

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
                compiled = any(f".{COMPILED}." in name for name in stored or ())  # parts of what saved it
                if (compiled or TRANSFORMERS < (5, 6)) and is_peft_available():
                    kwargs["adapter_state_dict"] = stored = _read_weights(peft_model_id, hub)
            if brought.get("model"):
                parts = cached_file(peft_model_id, PARTS_FILE, **QUIET, **hub)
                self.load_parts(Path(parts).parent if parts else peft_model_id, brought["model"], owner="")
        with uncompiled(self):  # type: ignore[arg-type]
            try:
                loaded = super().load_adapter(peft_model_id, adapter_name, *args, **kwargs)  # type: ignore[misc]
            except ValueError as error:
                if "get_peft_model" not in str(error):  # PEFT's way to make an adapter, of kinds such as VeRA
                    raise
                raise ValueError(
                    f"{error} What was saved loads by peft.PeftModel.from_pretrained(model, RUN)."
                ) from error
            if stored is not None:
                self._check_complete(name, with_adapter_name(stored, name))
        if self.adapter_state.parts_owner == "":
            self.adapter_state.parts_owner = name
            for field in OF_MODEL:  # without it its parts predict nothing: the config says what they do
                setattr(self.config, field, copy.copy(brought["model"].get(field, getattr(self.config, field))))
        self._check_values(name)
        config = self.peft_config[name]
        config.auto_mapping = {**(config.auto_mapping or {}), KEY: brought}
        config._openvla_checked, config._openvla_loaded = False, True
        self.adapter_state.check(config, self.config)
        return loaded

    @property
    def norm_stats(self) -> dict | None:
        """Statistics of the training datasets (published name): of the adapters that are active and brought some, else
        of the base, where they are saved with the config."""
        own = self.adapter_state.statistics(self._active_adapters(), self.config)
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
        return self._of_adapters("action_chunk")

    @property
    def camera_names(self) -> list[str]:
        """What the model sees: of an active adapter, else of the config."""
        return self._of_adapters("camera_names")

    @property
    def normalization(self) -> dict[str, str]:
        """Which statistics of a dataset -1 and 1 stand for: of an active adapter, else of the config."""
        return self._of_adapters("normalization")

    @property
    def constant_state(self) -> str:
        """What a number of the state becomes that never changed in training: of an active adapter, else of the
        config."""
        return self._of_adapters("constant_state")

    @property
    def prefix_training(self) -> int | None:
        """Steps of a chunk that the head learned to be given, at most: of an active adapter, else of the config; None
        where any number may be, as with tokens that follow one another."""
        return self._of_adapters("prefix_training") if self.action_head.parallel else None

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
            OpenVLAProcessor.ask_as_model(self._processor, self.config)  # of the class of a Hub folder's own code, too
            return self._processor
        processor = self.adapter_state.processor(self._active_adapters(), self._processor, self.config)
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
        state = self.adapter_state
        if state.configs and not state.find_layers(self):
            del self.peft_config  # unloaded; older PEFT leaves the configurations there
        return state.active()

    def _of_adapters(self, field: str) -> Any:
        return of_adapters(field, self._active_adapters(), self.config)


def _read_weights(adapter: str | os.PathLike, hub: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The weights of an adapter: transformers 5.4 and 5.5 find them only under "model." and leave all others random,
    later ones none that have the names of compiled parts."""
    from peft.utils import load_peft_weights

    weights = load_peft_weights(adapter, device="cpu", **hub_options(hub))
    weights = {name.replace(f".{COMPILED}.", "."): weight for name, weight in weights.items()}
    return {name.removeprefix("base_model.model."): weight for name, weight in weights.items()}


__all__ = ["AdapterBelongings"]
