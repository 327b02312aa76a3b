"""From a folder or Hub id to a model and back: weights, with an adapter where there is one, and statistics."""

import json
import os
import warnings
from collections.abc import Container, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import cached_file

from .action_tokenizer import check_statistics, check_units, read_statistics
from .active_adapters_openvla import AdapterBelongings
from .adapter_state_openvla import AdapterState
from .adapters_openvla import ADAPTER, belongings, check_base, find_adapter, find_base
from .choices_openvla import closest
from .configuration_openvla import OpenVLAConfig, check_reachable, plain_statistics
from .files_openvla import QUIET, local_folder, read_json
from .graphs_openvla import order_weights
from .modules_openvla import COMPILED, first_parameter, set_mode, uncompiled
from .oft_openvla import OFTFolder, find_oft, oft_folder, with_weights
from .outputs_openvla import CACHE_NAMES
from .parts_openvla import ModelParts
from .processing_openvla import OpenVLAProcessor
from .processor_files_openvla import HUB_KWARGS, hub_options
from .products_openvla import take_fast_products
from .quantization_openvla import (
    KNOWN_METHODS,
    QuantizedWeights,
    cast_unquantized,
    check_before_loading,
    check_quantized,
    keep_split_blocks_from_packing,
    take_quantization,
    turn_block_scales_back,
    unknown_method,
)
from .vision_openvla import init_vision_weights
from .weights_openvla import (
    LOADING,
    OLDER,
    WEIGHTS_FILES,
    check_filled,
    check_folder,
    check_loaded,
    check_placed,
    read_tensors,
    with_variant,
)


OF_WEIGHTS = (  # which fit others as well
    "action_head", "action_chunk", "camera_names", "n_action_bins", "diffusion_steps",
)  # fmt: skip
POSITIONS = ("inv_freq", "embed_positions", "pos_encoding")  # buffers of the library's language models, in no file


class OpenVLAPreTrainedModel(QuantizedWeights, AdapterBelongings, ModelParts, PreTrainedModel):
    """What the library asks of a model, and the part of ours that reads and writes folders."""

    config: OpenVLAConfig
    config_class = OpenVLAConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["OpenVLAVisionBackbone", "OpenVLAProjector"]  # those of the language model add themselves
    _skip_keys_device_placement = list(CACHE_NAMES)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    weights_in_order = False  # as predictions read them, see `order_weights`

    def __init__(self, config: OpenVLAConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        self.adapter_state = AdapterState()
        self._processor: OpenVLAProcessor | None = None
        self._processor_is_set = False
        self._hub_kwargs: dict[str, Any] = {}
        self._source: str | None = None  # the folder it came from, wherever the process goes meanwhile

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialize what `module` itself owns (Linear, Conv, Embedding and norms are the library's)."""
        super()._init_weights(module)
        init_vision_weights(module)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """Load a folder or Hub id, published layout or ours; `dataset_statistics.json` wins over `config.norm_stats`.

        With a `quantization_config` that names no exceptions, vision towers, projector and lm_head stay unquantized.
        A folder that holds a PEFT adapter is loaded together with the base it names. A folder of OpenVLA-OFT is known
        by its parts (`action_head--*_checkpoint.pt`, ...) and loaded with the pixels of its evaluation.

        Args:
            action_chunk, camera_names, normalization: Of a folder of OpenVLA-OFT, instead of what its platforms have
                (`oft_openvla`); `normalization` may be one name for all datasets.
            diffusion_steps: Those that the diffusion of a folder of OpenVLA-OFT was trained on, if they are not 50.
            action_head: "parallel_tokens" of a folder of OpenVLA-OFT's discrete variant, which does not tell it.
            base: What the adapter of a folder of OpenVLA-OFT was trained on, if it was not merged.
            ignore_mismatched_sizes: Let tensors of another shape than the stored ones begin at random.
            norm_stats: Statistics that count instead of those of the folder; so do others in `config`, where an auto
                class puts them.
            output_loading_info: Return the model, and a dict of the names that are missing, unexpected or of another
                shape, instead of raising an error for them.

        Raises:
            FileNotFoundError: If there is no such folder or Hub id, no config.json, or a weight file is missing.
            ValueError: If a file is damaged or a Git LFS pointer, or the weights lack tensors of the model, hold others
                or of another shape: nothing stays random.
        """
        name, learned = pretrained_model_name_or_path, kwargs.pop("_learned", ())  # by an adapter that comes on it
        hub = hub_options(kwargs)
        if isinstance(kwargs.get("config"), Mapping):
            raise ValueError("config is a dict, expected an OpenVLAConfig or the path of one: OpenVLAConfig(**config).")
        if name is not None:
            check_reachable(name, hub)
        given = check_statistics(kwargs["norm_stats"]) if kwargs.get("norm_stats") is not None else None
        of_adapter = dict(kwargs.pop("adapter_kwargs", None) or {})
        # Of a Hub id AutoModel passes the base, and the adapter beside it.
        adapter_name = of_adapter.pop("_adapter_model_path", None)
        if adapter_name is None:
            adapter_name = name
            of_adapter = {**hub, **of_adapter}
        adapter = None if adapter_name is None else find_adapter(adapter_name, of_adapter)
        if adapter is not None:
            return cls._from_adapter(adapter, given, adapter_name is name, *model_args, **kwargs)
        take_quantization(kwargs)
        oft = None
        if name is not None:
            head = kwargs.get("action_head", getattr(kwargs.get("config"), "action_head", None))
            oft = find_oft(oft_folder(name, **hub), head)
        if given is None and oft is not None:
            base = oft.find_base(kwargs.get("base"))
            given = _statistics_of_config(kwargs.get("config"), [] if base is None else [base], known=oft.statistics())
        elif given is None and name is not None:
            given = _statistics_of_config(kwargs.get("config"), [name], hub)
        loaded = cls._load(name, *model_args, **kwargs) if oft is None else cls._load_oft(oft, name, hub, **kwargs)
        model = _model_of(loaded)
        model._hub_kwargs |= hub
        if name is not None and (folder := local_folder(name)) is not None:
            model._source = str(folder.resolve())
        keep_split_blocks_from_packing(model)
        cast_unquantized(model)
        check_quantized(model, name)
        take_fast_products(model)
        before = model.config.norm_stats if given is None else None
        if given is not None:
            model.config.norm_stats = given
        elif name is not None:
            file = cached_file(name, "dataset_statistics.json", **QUIET, **hub)
            if file is not None:
                model.config.norm_stats = read_statistics(file)
            elif model.config.norm_stats:
                where = f"norm_stats of '{model.config.name_or_path}'"
                model.config.norm_stats = check_statistics(model.config.norm_stats, where)
        if oft is not None:
            oft.check_statistics(model.config.norm_stats, model.config)
        else:
            check_units(model.config.normalization, before, model.config.norm_stats)
            _warn_of_untrained(model.config, kwargs, name, hub, learned)
        return loaded

    @classmethod
    def _load_oft(cls, oft: OFTFolder, name, hub: dict[str, Any], config=None, **kwargs):
        """A folder or Hub id of OpenVLA-OFT; the weights are mapped from disk until all is known to fit."""
        base = oft.find_base(kwargs.pop("base", None))
        if config is None:
            fields = OpenVLAConfig().to_dict().keys() - {"dtype", "quantization_config"}
            given = {key: kwargs.pop(key) for key in fields & kwargs.keys()}
            config = OpenVLAConfig.from_pretrained(name, **hub, **given, **({} if base is None else {"base": base}))
        config = oft.complete(config)
        if base is None:
            weights = read_tensors(with_weights(name, oft.folder, **hub))
        else:
            with_weights(name, oft.folder, **hub)
            weights = read_tensors(
                local_folder(base) or Path(snapshot_download(str(base), allow_patterns=["*model*.safetensors*"]))
            )
        kwargs = {key: value for key, value in kwargs.items() if key not in HUB_KWARGS}
        loaded = cls._load(None, config=config, state_dict=oft.tensors(weights), where=name, **kwargs)
        model = _model_of(loaded)
        for parameter in model.parameters():  # not mapped any more: the folder may be written to while the model lives
            if type(parameter.data) is torch.Tensor and parameter.device.type == "cpu":
                parameter.data = parameter.data.clone()
        model.name_or_path = model.config.name_or_path = os.fspath(name)
        model._hub_kwargs = {"action_head": model.config.action_head, "camera_names": model.config.camera_names}
        if base is not None:
            of_base = local_folder(base)
            model._hub_kwargs["base"] = base if of_base is None else of_base.resolve()
        if (oft.folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(oft.folder)
        return loaded

    @classmethod
    def _from_adapter(cls, adapter: Path, given: dict | None, is_named: bool, *model_args, **kwargs):
        """The base of an adapter in a local folder, and the adapter on it.

        Args:
            given: Statistics that count instead of those of the adapter.
            is_named: Revision and subfolder are those of the adapter, not of its base.
        """
        adapter_name = kwargs.pop("adapter_name", None) or "default"
        base = find_base(adapter)
        if given is None:
            given = _statistics_of_config(kwargs.get("config"), [adapter, base])
        left_out = ("norm_stats", *(("revision", "subfolder") if is_named else ()))
        kwargs = {key: value for key, value in kwargs.items() if key not in left_out}
        brought = belongings(read_json(adapter / ADAPTER))
        learned = brought.get("model", {})
        for field, asked in kwargs.items():
            if field in learned and asked is not None and _count(asked) != _count(learned[field]):
                warnings.warn(
                    f"{field}={asked!r}: the adapter in '{adapter}' was trained with {learned[field]!r}, which counts: "
                    "leave it out.",
                    stacklevel=3,
                )
        loaded = cls.from_pretrained(base, *model_args, _learned=learned, **kwargs)
        problem = check_base(base, brought.get("base_digest"))
        if problem:
            raise ValueError(
                f"{problem}. Put its own base back, or add '{adapter}' to this one yourself: model = "
                "OpenVLAForActionPrediction.from_pretrained(BASE), then model.load_adapter(RUN)."
            )
        model = _model_of(loaded)
        model.load_adapter(str(adapter), adapter_name)
        if given is not None:
            model.norm_stats = given
        return loaded

    @classmethod
    def _load(cls, name, *model_args, ignore_mismatched_sizes=False, output_loading_info=False, where=None, **kwargs):
        """`from_pretrained` of the library, after which every tensor of the model is known to come from the weights.

        Args:
            where: What holds the weights, where that is not `name`.
        """
        if name is not None:
            check_folder(name, {**kwargs, "output_loading_info": output_loading_info})
            if kwargs.get("quantization_config") is not None:
                check_before_loading(kwargs, OpenVLAConfig.get_config_dict(name, **hub_options(kwargs))[0], name)
        try:
            model, info = super().from_pretrained(
                name, *model_args, ignore_mismatched_sizes=True, output_loading_info=True, **kwargs
            )
            check_placed(model.device, kwargs.get("device_map"))
            if name is None:  # to the library it came from "None"
                model.name_or_path = model.config.name_or_path = ""
            if output_loading_info:
                return model, info
            if name is not None or kwargs.get("state_dict"):  # an empty state_dict: all random on purpose
                check_loaded(where or name, info, ignore_mismatched_sizes)
                check_filled(where or name, model.named_parameters())
            return model
        except (ImportError, ValueError) as error:
            config = {} if name is None else OpenVLAConfig.get_config_dict(name, **hub_options(kwargs))[0]
            method = unknown_method(kwargs.get("quantization_config"), config)
            if method is None:
                raise
            taken = f"Taken are {', '.join(KNOWN_METHODS)} (openvla quantize; openvla[quant])"
            if not config.get("quantization_config"):
                raise ValueError(
                    f"quantization_config asks for '{method}', and that failed: {error} {taken}."
                ) from error
            raise ValueError(
                f"'{where or name}' is quantized by '{method}', which does not load here: {error} {taken}: give the "
                "model that it was made of."
            ) from error
        except TypeError as error:
            if "__init__() got an unexpected keyword argument" not in str(error):
                raise
            raise ValueError(_unknown_option(kwargs, str(error))) from error

    def _apply(self, fn, recurse=True):
        """As in every torch module, but for what positions are made of (`POSITIONS`): loaded in another type it has
        float32, and cast with the model it would stand for other positions (in bfloat16, at position 300, angles are
        off by up to 0.37 radians). Buffers that are in no file, and had no values before (`to_empty` of a model that
        was made on "meta"), are computed: no state_dict would bring them."""
        unsaved = [(module, name) for module in self.modules() for name in module._non_persistent_buffers_set]
        empty = {module for module, name in unsaved if getattr(module._buffers[name], "is_meta", False)}
        kept = [
            (module, name, buffer)
            for module in self.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and name.endswith(POSITIONS) and buffer.dtype == torch.float32
        ]
        super()._apply(fn, recurse)
        for module, name, buffer in kept:
            if (moved := module._buffers[name]) is not None and moved.dtype != buffer.dtype:
                module._buffers[name] = buffer.to(moved.device)
        filled = {one for one, name in unsaved if one in empty and not getattr(one._buffers[name], "is_meta", True)}
        for owner in self.modules() if filled else ():
            if isinstance(owner, PreTrainedModel):
                for module in filled.intersection(owner.modules()):
                    owner._init_weights(module)
        return self

    def train(self, mode: bool = True):
        """As in every torch module; weights that `prepare_for_inference` has put in order are put back, to learn. A
        model that predicts stays in evaluation mode until it has."""
        if mode:
            order_weights(self, learns=True)
        set_mode(self, mode, super().train)
        return self

    def _check_has_values(self) -> None:
        if self.device.type == "meta":
            raise ValueError('The weights are on "meta", where they have no values: give from_pretrained the folder.')

    def save_pretrained(self, save_directory, **kwargs):
        """Save weights under the published names, with the statistics beside them.

        A dataset_statistics.json of the folder is replaced (a warning says so if datasets of it are lost), but not by a
        model that has no statistics. A folder of OpenVLA-OFT gets the processor as well: its own files do not say which
        pixels the model sees, and nothing tells any more once its config.json is replaced.
        """
        if kwargs.get("state_dict") is None:
            self._check_has_values()
        turn_block_scales_back(self)
        self._keep_action_tokens()
        folder, main = Path(save_directory), kwargs.get("is_main_process", True)
        if folder.is_file():
            raise ValueError(f"'{folder}' is a file: give a folder.")
        files = single, index = tuple(
            folder / with_variant(name, kwargs.get("variant"))
            for name in (WEIGHTS_FILES[0], f"{WEIGHTS_FILES[0]}.index.json")
        )
        before = [*map(_written, files)]
        processor = self._processor_for(folder) if main else None
        if kwargs.get("state_dict") is not None:
            kwargs["state_dict"] = {
                name.replace(f"{COMPILED}.", ""): value for name, value in kwargs["state_dict"].items()
            }
        try:
            with uncompiled(self):  # accelerate 1.8 looks for what the model itself was compiled of
                super().save_pretrained(save_directory, **kwargs)
        except NotImplementedError as error:  # transformers 5.24: of weights that were stored so
            if any(parameter.is_meta for parameter in self.parameters()):
                raise ValueError(
                    "accelerate holds weights of the model elsewhere (cpu_offload, disk_offload), where they are not "
                    "found: bring them back by accelerate.hooks.remove_hook_from_submodules(model), then save it."
                ) from error
            if not getattr(self, "is_quantized", False):
                raise
            raise ValueError(
                f"The weights in '{self.config.name_or_path}' are quantized by another library, and transformers does "
                "not save what was loaded so: copy that folder, or save model.dequantize()."
            ) from error
        # The library leaves an older single file, which it would load, or an index of files that are gone.
        for file, older, other in zip(files, before, (index, single)):
            if main and _written(file) not in (None, older):
                other.unlink(missing_ok=True)
        if main:
            self._save_statistics(folder)
        if processor is not None:
            processor.save_pretrained(folder)

    def _processor_for(self, folder: Path) -> OpenVLAProcessor | None:
        """What has to be saved beside the weights, read before the files that tell of it are replaced."""
        oft = None
        with suppress(ValueError):  # of a folder that does not tell what it is
            oft = find_oft(folder, self.config.action_head)
        known = self._source or self._processor_is_set
        return self.processor if known and oft is not None else None

    def _upload_modified_files(self, working_dir, *args, **kwargs):
        self._save_statistics(Path(working_dir))  # before the library looks which files are to be uploaded
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def _save_statistics(self, folder: Path) -> None:
        """Write dataset_statistics.json, which counts when the folder is loaded."""
        file, text = folder / "dataset_statistics.json", json.dumps(plain_statistics(self.norm_stats) or {}, indent=2)
        own = json.loads(text)
        try:
            there = read_json(file) if file.is_file() else {}
        except ValueError:
            there = {}
        lost = sorted(name for name, entry in there.items() if entry != own.get(name))
        if lost and own:
            warnings.warn(
                f"'{file}' had other statistics of {', '.join(lost)}, and now has those of the model "
                f"({', '.join(sorted(own))}). If the others are those of its training, set model.norm_stats before it "
                "is saved.",
                stacklevel=3,
            )
        elif lost:
            warnings.warn(
                f"The model has no statistics: those that were in '{file}' already ({', '.join(lost)}) will count when "
                "it is loaded. Remove the file if they are of another model.",
                stacklevel=3,
            )
        if own:
            file.write_text(text, encoding="utf-8")

    @property
    def device(self) -> torch.device:
        """Where inputs belong: where the model computes, also if its weights are offloaded and lie on "meta"."""
        parameter = first_parameter(self)
        assert parameter is not None  # a model has weights
        device = parameter.device
        if device.type == "meta":
            hooks = (getattr(module, "_hf_hook", None) for module in self.modules())  # of accelerate
            execution = (getattr(hook, "execution_device", None) for hook in hooks)
            return torch.device(next((where for where in execution if where is not None), device))
        return device


def _written(file: Path) -> int | None:
    """When it was written; None where there is none."""
    return file.stat().st_mtime_ns if file.is_file() else None


def _model_of(loaded: Any) -> Any:
    """The model that `from_pretrained` of the library gave, alone or beside its loading info."""
    return loaded[0] if isinstance(loaded, tuple) else loaded


def _unknown_option(options: Mapping[str, Any], error: str) -> str:
    """What to say of the one of `options` that `error` names, which neither the library nor a configuration knows."""
    unknown = next((key for key in options if f"'{key}'" in error), "")
    fields = OpenVLAConfig().to_dict()
    if unknown in fields and options.get("config") is not None:
        return f"{unknown}={options[unknown]!r:.100} beside config=...: set it in the configuration."
    said = f"from_pretrained does not know {unknown}={options.get(unknown)!r:.100}."
    if unknown in OLDER:
        return f"{said} Since transformers 5 it is {OLDER[unknown]}."
    return said if unknown in fields else said + closest(unknown, {*fields, *LOADING})


def _warn_of_untrained(
    config: OpenVLAConfig, options: Mapping[str, Any], name: Any, hub: Mapping[str, Any], learned: Container[str]
) -> None:
    """Say that a folder was trained for another chunk, head or number of cameras than are asked for, by options or in a
    config, where the auto classes put them: the weights fit, and what they never learned looks like actions. A folder
    whose own config.json is missing or cannot be used, to which another is given, says nothing. Fields that an adapter
    `learned` are its own."""
    if name is None or options.keys().isdisjoint(("config", *OF_WEIGHTS)):
        return
    try:
        stored = OpenVLAConfig.from_pretrained(name, **hub)
    except (OSError, ValueError):
        return
    for field in OF_WEIGHTS:
        if field in learned or (field == "diffusion_steps" and config.action_head != "diffusion"):
            continue
        said, asked = (getattr(one, field) for one in (stored, config))
        if _count(said) != _count(asked):
            warnings.warn(
                f"{field}={asked!r}: the config.json of '{name}' says {said!r}, so its weights never learned that, and "
                "would act by it: leave it out, or train it (openvla finetune).",
                stacklevel=3,
            )


def _count(value: Any) -> Any:
    """Cameras may be renamed."""
    return len(value) if isinstance(value, (list, tuple)) else value


def _statistics_of_config(
    config: Any,
    names: Sequence[Any],
    hub: Mapping[str, Any] = MappingProxyType({}),
    known: Sequence[Mapping[str, Any]] = (),
) -> dict | None:
    """Statistics in a config that somebody gave, as an auto class hands them on; None if there are none, or they are
    those of the config.json of one of `names`, or `known`."""
    given = getattr(config, "norm_stats", None)
    if not given or given in known:
        return None
    for name in names:
        try:
            stored = OpenVLAConfig.get_config_dict(name, **hub)[0].get("norm_stats")
        except OSError:
            continue
        if given == stored:
            return None
    return check_statistics(given)


__all__ = ["OpenVLAPreTrainedModel"]
