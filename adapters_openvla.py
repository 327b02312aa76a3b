"""Adapters (PEFT): what belongs to them beside their weights, and the base they were trained on.

An adapter speaks the units of its own training, from its own prompts and pixels. PEFT hands a model nothing of an
adapter's folder but what stands in adapter_config.json; there, under the free `auto_mapping`, a run keeps it:

    {"openvla": {"norm_stats": {...}, "processor": {"image_processor": {...}, "prompt_template": "..."},
                 "base_digest": "..."}}
"""

import os
import warnings
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from .action_tokenizer import check_statistics, read_statistics
from .files_openvla import cache_folder, local_folder, read_json, weights_digest
from .processing_openvla import HUB_KWARGS, OpenVLAImageProcessor, OpenVLAProcessor


KEY = "openvla"
ADAPTER = "adapter_config.json"
EMBEDDED_POLICY = "embedded policy"  # the name of the base that comes with the package
PACKAGE = Path(__file__).resolve().parent


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
        return cached_file(
            os.fspath(adapter),
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **hub,
        )

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
    return found


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


def adapter_folder(model: str | os.PathLike | None) -> Path | None:
    """The local folder `model`, if it holds an adapter and no weights of a whole model."""
    folder = Path(model) if model else None
    if folder is None or not (folder / ADAPTER).is_file() or any(folder.glob("*model-0*.safetensors")):
        return None
    return None if (folder / "model.safetensors").is_file() else folder


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
    """Of a model: units, prompt form and pixels are those of the adapters that are active, however they were added
    (`load_adapter`, `PeftModel`), chosen, disabled, deleted or merged; without one, those of the base.

    `peft_config` is where PEFT writes the adapters of a model down.
    """

    config: Any
    modules: Any

    @property
    def peft_config(self) -> dict[str, Any]:
        if "_peft_config" not in self.__dict__:
            raise AttributeError("The model has no adapters.")
        return self.__dict__["_peft_config"]

    @peft_config.setter
    def peft_config(self, value: dict[str, Any]) -> None:
        # A layer is kept, because it tells what was merged when PEFT has taken the layers out. In a list: it must not
        # become a part of the model.
        self.__dict__.update(_peft_config=value, _tuner_layer=[self._find_tuner_layer()])

    @peft_config.deleter
    def peft_config(self) -> None:
        if "_peft_config" not in self.__dict__:
            raise AttributeError("The model has no adapters.")
        layer = self.__dict__.pop("_tuner_layer")[0]
        configs = self.__dict__.pop("_peft_config")
        merged = [configs[name] for name in getattr(layer, "merged_adapters", ()) if name in configs]
        if merged:  # the base is now what they make of it
            statistics, processor = _together(merged, "norm_stats"), _together(merged, "processor")
            if statistics is not None:
                self.config.norm_stats = statistics
            self._merged_processor = processor

    def _find_tuner_layer(self) -> Any:
        return next((module for module in self.modules() if hasattr(module, "merged_adapters")), None)

    def _active_adapters(self) -> list[Any]:
        """Configurations of the adapters that take part in a prediction."""
        configs = self.__dict__.get("_peft_config")
        if not configs:
            return []
        layer = self._find_tuner_layer()
        if layer is None:  # unloaded; older PEFT leaves the configurations there
            del self.peft_config
            return []
        if layer.disable_adapters:
            return []
        return [configs[name] for name in layer.active_adapters if name in configs]

    def _adapter_statistics(self) -> dict[str, Any] | None:
        """Statistics of the active adapters together; None where those of the base count.

        Raises:
            ValueError: If they cannot be acted on, or differ between adapters for one dataset.
        """
        active = self._active_adapters()
        for config in active:
            self._check_adapter(config)
        return _together(active, "norm_stats")

    def _adapter_processor(self) -> dict[str, Any] | None:
        return _together(self._active_adapters(), "processor") or self.__dict__.get("_merged_processor")

    def _check_adapter(self, config: Any) -> None:
        """Warn once if nothing is known of the training of an adapter that was loaded, or it had another base."""
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
        """Note what belongs to the adapter `name`."""
        config = self.peft_config[name]
        config.auto_mapping = {**(config.auto_mapping or {}), KEY: brought}
        config._openvla_checked = False
        self._check_adapter(config)


def _together(configs: list[Any], what: str) -> Any:
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
