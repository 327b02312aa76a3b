"""Weights of adapters (PEFT) on a model: whether all of them are there, and whether what a configuration says is still
said of them.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch

from .adapter_state_openvla import AdapterState, forget
from .modules_openvla import COMPILED


NAMELESS = re.compile(r"\.lora_(embedding_)?[AB](\.weight|\.bias)?$")  # of an adapter's tensors as they are stored
LORA_OR_WHOLE = ("lora_", "modules_to_save", "token_adapter", "trainable_tokens")  # others: complete modules, rows


class AdapterWeights:
    """Of a model. PEFT tells it nothing of an adapter that it makes of others (`add_weighted_adapter`), or of other
    weights that it loads under the name of one: what a configuration says is believed only of the weights that came
    with it.
    """

    adapter_state: AdapterState
    device: Any
    named_parameters: Any

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        # torch calls it of every module whose weights are loaded: PEFT loads those of an adapter in this way.
        configs = self.adapter_state.configs or {}
        # PEFT gives the name of the adapter to tensors of layers that it knows only.
        others = "|".join(self._tensors_of_other_kinds() if configs else ())
        of_others = re.compile(rf"\.({others})(\.weight|\.bias)?$" if others else "(?!)")
        strange = [key for key in state_dict if NAMELESS.search(key) or of_others.search(key)] if configs else []
        for name, config in configs.items():
            loaded = {key: value for key, value in state_dict.items() if is_of(key, name)}
            if not loaded and not (strange and name == list(configs)[-1]):
                continue
            _check_not_zero(name, loaded.values())
            self._check_complete(name, [key.removeprefix(prefix) for key in (*loaded, *strange)])
            if getattr(config, "_openvla_loaded", False) and config.inference_mode and self._differ(loaded, prefix):
                forget(config, f"Other weights were loaded under the name of the adapter '{name}'")
            config._openvla_loaded = True
        if configs:
            self.adapter_state.find_layers(self)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)  # type: ignore[misc]

    def _check_complete(self, name: str, loaded: Iterable[str]) -> None:
        """Raise a `ValueError` if the weights that were loaded for an adapter are not those that it has here: the
        libraries warn of what is missing at the most, and a layer without its weights does nothing."""
        names, loaded = [key for key, _ in self.named_parameters()], [*loaded]
        own = {key for key in names if ".lora_" in key and is_of(key, name)}
        found = {key for key in loaded if ".lora_" in key}
        if others := self._tensors_of_other_kinds():  # LoHa, IA3, OFT, ...
            tensor = re.compile(rf"\.({'|'.join(others)})(\.{re.escape(name)})?(?=\.|$)")
            own |= {tensor.sub(r".\1", key) for key in names if (of := tensor.search(key)) and of[2]}
            found |= {tensor.sub(r".\1", key) for key in loaded if tensor.search(key)}
        problems = [
            f"{len(keys)} {problem}: {', '.join(sorted(keys)[:3])}{', ...' if len(keys) > 3 else ''}"
            for problem, keys in (("missing", own - found), ("that the model does not have", found - own))
            if keys
        ]
        if problems:
            why = f"The weights of the adapter '{name}' are not those of its adapter_config.json on this base"
            self.adapter_state.disown(name, why)
            remedy = "Is it an adapter of another base, or was it saved under other names or cut off?"
            if any(f".{COMPILED}." in key for key in found - own):
                remedy = "It was saved of compiled parts: OpenVLAForActionPrediction.from_pretrained(RUN) loads it."
            if getattr((self.adapter_state.configs or {})[name], "use_dora", False):  # 5.4 to 5.24
                remedy = (
                    "It has use_dora, whose magnitudes transformers does not load: take "
                    "peft.PeftModel.from_pretrained(model, RUN)."
                )
            raise ValueError(f"{why}. Tensors {'; '.join(problems)}. {remedy}")

    def _tensors_of_other_kinds(self) -> list[str]:
        """Names of the tensors of adapters that are no LoRA, before the name of the adapter."""
        kinds = {kind for layer in self.adapter_state.find_layers(self) for kind in layer.adapter_layer_names}
        return [re.escape(kind) for kind in sorted(kinds) if not kind.startswith(LORA_OR_WHOLE)]

    def _check_values(self, name: str) -> None:
        """Raise a `ValueError` if the weights of an adapter that was just loaded have no values."""
        own = [value for key, value in self.named_parameters() if is_of(key, name)]
        if self.device.type != "meta" and any(value.is_meta for value in own):
            why = f"Weights of the adapter '{name}' have no values: they are on layers that are offloaded"
            self.adapter_state.disown(name, why)
            raise ValueError(
                f"{why} (device_map), from where they are not brought back. Merge it first (`openvla merge RUN OUT`) "
                "and load OUT, or keep these layers on a device."
            )
        _check_not_zero(name, own)

    def _differ(self, loaded: Mapping[str, torch.Tensor], prefix: str) -> bool:
        own = dict(self.named_parameters())
        pairs = ((own.get(name.removeprefix(prefix)), value) for name, value in loaded.items())
        return any(there is not None and not torch.equal(there, value.to(there)) for there, value in pairs)

    def _save_to_state_dict(self, *args, **kwargs):
        # What an adapter is saved with; PEFT asks before it loads one as well.
        self.adapter_state.settle(before_loading=True)
        super()._save_to_state_dict(*args, **kwargs)  # type: ignore[misc]


def with_adapter_name(names: Iterable[str], adapter: str) -> list[str]:
    """Names of stored tensors as a model has them: X.lora_A.weight is X.lora_A.NAME.weight there."""
    own = (name.removeprefix("base_model.model.").removeprefix("model.") for name in names)
    return [
        name if is_of(name, adapter) else re.sub(r"(\.lora_\w+)", lambda kind: f"{kind[0]}.{adapter}", name, count=1)
        for name in own
    ]


def is_of(key: str, adapter: str) -> bool:
    """Whether a tensor of the name `key` is of an adapter, whose name may be that of a part of the model, as "0" is."""
    _, lora, after = key.partition(".lora_")  # A.NAME.weight
    return f"{after.partition('.')[2]}.".startswith(f"{adapter}.") if lora else f".{adapter}." in f"{key}."


def _check_not_zero(name: str, weights: Collection[torch.Tensor]) -> None:
    if weights and not any(weight.is_meta or bool(weight.any()) for weight in weights):
        raise ValueError(
            f"The weights of the adapter '{name}' are all zero, which no training leaves behind: a file that was "
            "allocated and never filled, copy or download it again."
        )


__all__ = ["AdapterWeights", "with_adapter_name"]
