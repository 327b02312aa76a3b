"""Adapters (PEFT): what belongs to them beside their weights, and the base they were trained on.

An adapter speaks the units of its own training, from its own prompts and pixels. PEFT hands a model nothing of an
adapter's folder but what stands in adapter_config.json; there, under the free `auto_mapping`, a run keeps it:

    {"openvla": {"norm_stats": {...}, "processor": {"image_processor": {...}, "prompt_template": "..."},
                 "model": {"action_chunk": 1, "camera_names": ["primary"]}, "base_digest": "..."}}
"""

import os
import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import cached_file

from .action_tokenizer import check_statistics, read_statistics
from .files_openvla import QUIET, cache_folder, check_file, local_folder, read_json, weights_digest
from .image_processing_openvla import OpenVLAImageProcessor
from .modules_openvla import modules_of
from .parts_openvla import PARTS, asks_for_parts
from .processing_openvla import HUB_KWARGS, STARTED, OpenVLAProcessor, pixels_of_older_run
from .weights_openvla import WEIGHTS_FILES


KEY = "openvla"
ADAPTER = "adapter_config.json"
# Fields of the configuration that training may change
OF_MODEL = ("action_chunk", "camera_names", "normalization", "constant_state", "prefix_training")
EMBEDDED_POLICY = "embedded policy"  # the name of the base that comes with the package
PACKAGE = Path(__file__).resolve().parent
NAMELESS = re.compile(r"\.lora_(embedding_)?[AB](\.weight|\.bias)?$")  # of an adapter's tensors as they are stored


# What belongs to an adapter -------------------------------------------------------------------------------------------


def belongings(adapter_config: Any) -> dict[str, Any]:
    """What a `PeftConfig`, or the content of an adapter_config.json, says of its training; empty if nothing."""
    known = adapter_config if isinstance(adapter_config, dict) else vars(adapter_config)
    return dict((known.get("auto_mapping") or {}).get(KEY) or {})


def read_belongings(adapter: str | os.PathLike, **hub: Any) -> dict[str, Any]:
    """What the folder or Hub id of an adapter holds of its training; files win over its adapter_config.json.

    Raises:
        FileNotFoundError: If there is no adapter.
        ValueError: If a file is damaged, or the statistics cannot be acted on.
    """
    hub = {name: value for name, value in hub.items() if name in HUB_KWARGS}

    def file(name: str) -> str | None:
        return cached_file(os.fspath(adapter), name, **QUIET, **hub)

    config = file(ADAPTER)
    if config is None:
        raise FileNotFoundError(f"'{adapter}' holds no adapter ({ADAPTER}): is it the output of a lora run?")
    found = belongings(read_json(config))
    if (statistics := file("dataset_statistics.json")) is not None:
        found["norm_stats"] = read_statistics(statistics)
    elif "norm_stats" in found:
        check_statistics(found["norm_stats"], f"'{config}'")
    if (processor := file("processor_config.json")) is not None:
        found["processor"] = of_processor(read_json(processor))
    elif (images := file("preprocessor_config.json")) is not None:
        found["processor"] = of_processor({"image_processor": read_json(images)})
    if images := found.get("processor", {}).get("image_processor"):
        file(STARTED)  # of a Hub id it is brought beside the others
        images |= pixels_of_older_run(Path(config).parent, images)
    return found


def adapter_names(adapter: str | os.PathLike, hub: Mapping[str, Any]) -> list[str] | None:
    """Names of the tensors of an adapter, a folder or Hub id; None where it is not stored as safetensors."""
    hub = {name: value for name, value in hub.items() if name in HUB_KWARGS}
    file = cached_file(os.fspath(adapter), "adapter_model.safetensors", **QUIET, **hub)
    if file is None:
        return None
    with safe_open(check_file(file, "weights file of the adapter"), framework="pt") as stored:
        return list(stored.keys())


def with_adapter_name(names: Iterable[str], adapter: str) -> list[str]:
    """Names of stored tensors as a model has them: X.lora_A.weight is X.lora_A.NAME.weight there."""
    own = (name.removeprefix("base_model.model.").removeprefix("model.") for name in names)
    return [
        re.sub(r"(\.lora_\w+)", rf"\1.{adapter}", name, count=1) if f".{adapter}." not in f"{name}." else name
        for name in own
    ]


def of_processor(content: dict[str, Any]) -> dict[str, Any]:
    """Pixels and prompt form of a processor's configuration, without references to code."""
    images = {name: value for name, value in content.get("image_processor", {}).items() if name != "auto_map"}
    return {"image_processor": images, "prompt_template": content.get("prompt_template")}


def with_belongings(processor: OpenVLAProcessor, brought: dict[str, Any] | None) -> OpenVLAProcessor:
    """A processor with the pixels and the prompt form of an adapter, where it brought them."""
    if not brought:
        return processor
    images = brought.get("image_processor")
    return OpenVLAProcessor(
        OpenVLAImageProcessor.from_dict(images) if images else processor.image_processor,
        processor.tokenizer,
        prompt_template=brought.get("prompt_template") or processor.prompt_template,
    )


# Its base -------------------------------------------------------------------------------------------------------------


def find_adapter(model: str | os.PathLike, hub: Mapping[str, Any] = MappingProxyType({})) -> Path | None:
    """The local folder, or the cached one of a Hub id, of the adapter that `model` is; None if it is none.

    Args:
        hub: Of `HUB_KWARGS`.

    Raises:
        FileNotFoundError: If `model` is neither folder nor Hub id.
        ValueError: If it holds weights of a model as well: nothing says whether they include the adapter.
    """
    local_folder(model)
    options = {name: value for name, value in hub.items() if name in HUB_KWARGS} | QUIET
    config = cached_file(os.fspath(model), ADAPTER, **options)
    if config is None:
        return None
    read_json(config)  # says what is wrong with it
    for name in WEIGHTS_FILES:
        for file in (name, f"{name}.index.json"):
            if cached_file(os.fspath(model), file, **options) is not None:
                raise ValueError(
                    f"'{os.fspath(model)}' holds a model ({file}) and an adapter ({ADAPTER}), and nothing says whether "
                    "the weights include the adapter. Give each its own folder, or remove the adapter's files from "
                    "a model that it was merged into."
                )
    return Path(config).parent


def portable_path(path: str | os.PathLike, start: str | os.PathLike) -> str:
    """How a file in `start` names a local path so that others learn nothing of this machine: relative to `start` where
    the two lie near each other, else its last part."""
    path, start = Path(path).expanduser().resolve(), Path(start).expanduser().resolve()
    common = Path(os.path.commonpath([path, start]))
    up = len(start.relative_to(common).parts)
    if up > 2 or common in (Path(common.anchor), *Path.home().parents):
        return path.name
    relative = Path(os.path.relpath(path, start)).as_posix()
    return relative if relative.startswith(".") else f"./{relative}"


def portable_model(model: str | os.PathLike, start: str | os.PathLike) -> str:
    """How a file in `start` names a model: a Hub id and the embedded policy by name, a folder by a portable path."""
    folder = local_folder(model)
    if folder is None:
        return os.fspath(model)
    return EMBEDDED_POLICY if folder.resolve() == PACKAGE else portable_path(folder, start)


def name_base(model: str | os.PathLike, output: str | os.PathLike) -> tuple[str, str]:
    """How the adapters of a run in `output` name the base `model`, and the digest of its weights.

    Hub ids and the embedded policy stay as they are; a folder gets a portable path. Where it lies is noted in the
    cache of this machine.
    """
    digest, folder = weights_digest(model), local_folder(model)
    if folder is not None and folder.resolve() != PACKAGE:
        note = cache_folder() / "bases" / digest
        try:
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(str(folder.resolve()), encoding="utf-8")
        except OSError as error:
            warnings.warn(f"'{note}' cannot be written ({error}): the base is found by its path only.", stacklevel=2)
    return portable_model(model, output), digest


def find_base(adapter: str | os.PathLike) -> str:
    """Folder or Hub id of the base of an adapter in a local folder.

    A path is relative to the run, or to the folder of the adapter, which may be one of the run's checkpoints.

    Raises:
        FileNotFoundError: If the base is not there.
    """
    folder = Path(adapter)
    config = read_json(folder / ADAPTER)
    name, digest = config.get("base_model_name_or_path"), belongings(config).get("base_digest")
    remedy = (
        "Say where it is: `openvla merge RUN OUT --base BASE` makes one model of the two; in Python "
        "model = OpenVLAForActionPrediction.from_pretrained(BASE), then model.load_adapter(RUN)."
    )
    if not name:
        raise FileNotFoundError(f"'{folder / ADAPTER}' does not name the base of the adapter. {remedy}")
    if name == EMBEDDED_POLICY and (PACKAGE / "config.json").is_file():
        return str(PACKAGE)
    resolved = folder.resolve()
    candidates = [start / name for start in (resolved, *resolved.parents[:2])]
    if digest and (note := cache_folder() / "bases" / digest).is_file():
        candidates.append(Path(note.read_text(encoding="utf-8")))
    for candidate in candidates:
        if (candidate / "config.json").is_file():
            return str(candidate.resolve())
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return name  # a Hub id
    raise FileNotFoundError(f"The base '{name}' of the adapter in '{folder}' was not found. {remedy}")


def check_base(base: str | os.PathLike, digest: str | None) -> str | None:
    """What is wrong if `base` has other weights than an adapter was trained on (of `digest`); None if nothing is, or
    nothing is known."""
    if digest is None:
        return None
    try:
        found = weights_digest(base)
    except FileNotFoundError:
        return None
    if found == digest:
        return None
    return (
        f"The weights of the base '{base}' are not those the adapter was trained on (digest {found[:8]} instead of "
        f"{digest[:8]}), so its actions may be wrong"
    )


# On a model -----------------------------------------------------------------------------------------------------------


class AdapterBelongings:
    """Of a model: units, prompt form and pixels are those of the adapters that take part in a prediction, however they
    were added (`load_adapter`, `PeftModel`), chosen, disabled, deleted or merged; without one, those of the base.

    `peft_config` is where PEFT writes the adapters of a model down. It tells nothing of an adapter that it makes of
    others (`add_weighted_adapter`), or of other weights that it loads under the name of one: what a configuration says
    is believed only of the weights that came with it.
    """

    config: Any
    device: Any
    modules: Any

    @property
    def peft_config(self) -> dict[str, Any]:
        if "_peft_config" not in self.__dict__:
            raise AttributeError("The model has no adapters.")
        return self.__dict__["_peft_config"]

    @peft_config.setter
    def peft_config(self, value: dict[str, Any]) -> None:
        self.__dict__["_peft_config"] = value
        self._tuner_layers()

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
                self._check_known(config, configs)
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

    def _tuner_layers(self) -> list[Any]:
        """Layers of adapters. Kept, in a tuple: they must not become a part of the model."""
        layers = [module for module in modules_of(self).below if hasattr(type(module), "merged_adapters")]  # type: ignore
        if layers:
            self.__dict__["_known_tuner_layers"] = tuple(layers)
        return layers

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

    def _check_adapter(self, config: Any) -> None:
        """Raise a `ValueError` if the units of an adapter are not known; warn once if nothing is known of its training,
        or it had another base."""
        self._check_known(config)
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
        problem = check_base(self.config.name_or_path, brought.get("base_digest")) if self.config.name_or_path else None
        if problem:
            warnings.warn(f"{problem}.", stacklevel=3)

    def _bring(self, name: str, brought: dict[str, Any]) -> None:
        """Note what belongs to the adapter `name`, whose weights were just loaded."""
        config = self.peft_config[name]
        own = [value for key, value in self.named_parameters() if f".{name}." in f"{key}."]  # type: ignore[attr-defined]
        if self.device.type != "meta" and any(value.is_meta for value in own):
            why = f"Weights of the adapter '{name}' have no values: they are on layers that are offloaded"
            _forget(config, why)
            config._openvla_loaded = True
            raise ValueError(
                f"{why} (device_map), from where they are not brought back. Merge it first (`openvla merge RUN OUT`) "
                "and load OUT, or keep these layers on a device."
            )
        _check_filled(name, own)
        config.auto_mapping = {**(config.auto_mapping or {}), KEY: brought}
        config._openvla_checked, config._openvla_loaded = False, True
        self._check_adapter(config)

    # What PEFT does not tell ----------------------------------------------------------------------------------------

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        # torch calls it of every module whose weights are loaded: PEFT loads those of an adapter in this way.
        configs = self.__dict__.get("_peft_config") or {}
        # PEFT gives the name of the adapter to tensors of layers that it knows only.
        strange = [key for key in state_dict if NAMELESS.search(key)] if configs else []
        for name, config in configs.items():
            loaded = {key: value for key, value in state_dict.items() if f".{name}." in f"{key}."}
            if not loaded and not (strange and name == list(configs)[-1]):
                continue
            _check_filled(name, loaded.values())
            self._check_complete(name, [key.removeprefix(prefix) for key in (*loaded, *strange)])
            if getattr(config, "_openvla_loaded", False) and config.inference_mode and self._differ(loaded, prefix):
                _forget(config, f"Other weights were loaded under the name of the adapter '{name}'")
            config._openvla_loaded = True
        if configs:
            self._tuner_layers()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)  # type: ignore[misc]

    def _check_complete(self, name: str, loaded: Iterable[str]) -> None:
        """Raise a `ValueError` if the weights that were loaded for an adapter are not those that it has here: the
        libraries warn of what is missing at the most, and a layer without its weights does nothing."""
        own = {key for key, _ in self.named_parameters() if ".lora_" in key and f".{name}." in f"{key}."}  # type: ignore
        found = {key for key in loaded if ".lora_" in key}
        problems = [
            f"{len(keys)} {problem}: {', '.join(sorted(keys)[:3])}{', ...' if len(keys) > 3 else ''}"
            for problem, keys in (("missing", own - found), ("that the model does not have", found - own))
            if keys
        ]
        if problems:
            why = f"The weights of the adapter '{name}' are not those of its adapter_config.json on this base"
            config = self.__dict__["_peft_config"][name]
            _forget(config, why)
            config._openvla_loaded = True
            remedy = "Is it an adapter of another base, or was it saved under other names or cut off?"
            if getattr(config, "use_dora", False):  # 5.4 to 5.24
                remedy = (
                    "It has use_dora, whose magnitudes transformers does not load: take "
                    "peft.PeftModel.from_pretrained(model, RUN)."
                )
            raise ValueError(f"{why}. Tensors {'; '.join(problems)}. {remedy}")

    def _differ(self, loaded: Mapping[str, torch.Tensor], prefix: str) -> bool:
        own = dict(self.named_parameters())  # type: ignore[attr-defined]
        pairs = ((own.get(name.removeprefix(prefix)), value) for name, value in loaded.items())
        return any(there is not None and not torch.equal(there, value.to(there)) for there, value in pairs)

    def _save_to_state_dict(self, *args, **kwargs):
        self._settle(before_loading=True)  # what an adapter is saved with; PEFT asks before it loads one as well
        super()._save_to_state_dict(*args, **kwargs)  # type: ignore[misc]

    def _settle(self, before_loading: bool = False) -> None:
        """Find the adapters that were made of others: their configuration is a copy, and its weights were not loaded.
        They keep what it says only where all others say the same.

        Args:
            before_loading: Adapters may be there whose weights come next.
        """
        configs = self.__dict__.get("_peft_config") or {}
        for name, config in configs.items():
            others = [other for other in configs.values() if other is not config]
            shared = any(other.auto_mapping is config.auto_mapping for other in others)
            copied = shared or (config.inference_mode and not before_loading)
            made = copied and not getattr(config, "_openvla_loaded", False)
            if not made or not belongings(config):
                continue
            if not others or any(_units(other) != _units(config) for other in others):
                _forget(config, f"The adapter '{name}' was made of others, which have other units or are gone")
            config.auto_mapping, config._openvla_loaded = dict(config.auto_mapping), True


def _at_work(layer: Any) -> list[str]:
    """Names of the adapters whose weights a layer computes with."""
    if layer.disable_adapters:
        return []
    if layer.merged_adapters:
        return layer.merged_adapters
    own = {name for kind in layer.adapter_layer_names for name in getattr(layer, kind, ())}
    return [name for name in layer.active_adapters if name in own]


def _check_filled(name: str, weights: Collection[torch.Tensor]) -> None:
    if weights and not any(weight.is_meta or bool(weight.any()) for weight in weights):
        raise ValueError(
            f"The weights of the adapter '{name}' are all zero, which no training leaves behind: a file that was "
            "allocated and never filled, copy or download it again."
        )


def _units(config: Any) -> tuple[Any, Any]:
    brought = belongings(config)
    return brought.get("norm_stats"), brought.get("processor")


def _forget(config: Any, why: str) -> None:
    """Let a configuration say that its units are not known, also where it is saved."""
    config.auto_mapping = {**(config.auto_mapping or {}), KEY: {"unknown": why}}


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


__all__ = ["AdapterBelongings"]
