"""From a folder or Hub id to a model and back: weights, adapters, statistics and the processor that belongs to them."""

import copy
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import cached_file, is_peft_available

from .action_tokenizer import check_statistics, check_units, read_statistics
from .adapters_openvla import (
    ADAPTER,
    KEY,
    OF_MODEL,
    AdapterBelongings,
    adapter_names,
    belongings,
    check_base,
    find_adapter,
    find_base,
    read_belongings,
    with_adapter_name,
    with_belongings,
)
from .choices_openvla import closest
from .configuration_openvla import TRANSFORMERS, OpenVLAConfig, plain_statistics
from .files_openvla import QUIET, local_folder, read_json
from .oft_openvla import OFTFolder, find_oft, oft_folder, with_weights
from .outputs_openvla import CACHE_NAMES
from .parts_openvla import PARTS_FILE, ModelParts
from .processing_openvla import HUB_KWARGS, OpenVLAProcessor
from .quantization_openvla import (
    KNOWN_METHODS,
    METHOD,
    check_quantized,
    has_quantized_layers,
    keep_split_blocks_from_packing,
    take_quantization,
    turn_block_scales_back,
    unknown_method,
)
from .quantized_linear_openvla import is_rounded
from .vision_openvla import init_vision_weights
from .weights_openvla import (
    LOADING,
    WEIGHTS_FILES,
    check_filled,
    check_folder,
    check_loaded,
    check_placed,
    read_tensors,
)


class OpenVLAPreTrainedModel(AdapterBelongings, ModelParts, PreTrainedModel):
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

    def __init__(self, config: OpenVLAConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        self._processor: OpenVLAProcessor | None = None
        self._processor_is_set = False
        self._adapted_processor: tuple[dict | None, OpenVLAProcessor | None] = (None, None)
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
        name = pretrained_model_name_or_path
        hub = {key: kwargs[key] for key in HUB_KWARGS if key in kwargs}
        given = check_statistics(kwargs["norm_stats"]) if kwargs.get("norm_stats") is not None else None
        of_adapter = dict(kwargs.pop("adapter_kwargs", None) or {})
        # Of a Hub id AutoModel passes the base, and the adapter beside it.
        adapter_name = of_adapter.pop("_adapter_model_path", None)
        if adapter_name is None:
            adapter_name = name
            of_adapter = {**hub, **of_adapter}
        adapter = None if adapter_name is None else find_adapter(adapter_name, of_adapter)
        if adapter is not None:
            if given is None:
                given = _statistics_of_config(kwargs.get("config"), [adapter, find_base(adapter)])
            # Not of the base: where the adapter's repository was named, which revision and folder of it
            left_out = ("norm_stats", *(("revision", "subfolder") if adapter_name is name else ()))
            kwargs = {key: value for key, value in kwargs.items() if key not in left_out}
            loaded = cls._from_adapter(adapter, *model_args, **kwargs)
            if given is not None:
                (loaded[0] if isinstance(loaded, tuple) else loaded).norm_stats = given
            return loaded
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
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model._hub_kwargs |= hub
        if name is not None and (folder := local_folder(name)) is not None:
            model._source = str(folder.resolve())
        keep_split_blocks_from_packing(model)
        _cast_unquantized(model)
        check_quantized(model, kwargs.get("quantization_config"), name)
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
        model = loaded[0] if isinstance(loaded, tuple) else loaded
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
    def _from_adapter(cls, adapter: Path, *model_args, **kwargs):
        """The base of an adapter in a local folder, and the adapter on it."""
        adapter_name = kwargs.pop("adapter_name", None) or "default"
        base = find_base(adapter)
        loaded = cls.from_pretrained(base, *model_args, **kwargs)
        problem = check_base(base, belongings(read_json(adapter / ADAPTER)).get("base_digest"))
        if problem:
            raise ValueError(
                f"{problem}. Put its own base back, or add '{adapter}' to this one yourself: model = "
                "OpenVLAForActionPrediction.from_pretrained(BASE), then model.load_adapter(RUN)."
            )
        (loaded[0] if isinstance(loaded, tuple) else loaded).load_adapter(str(adapter), adapter_name)
        return loaded

    @classmethod
    def _load(cls, name, *model_args, ignore_mismatched_sizes=False, output_loading_info=False, where=None, **kwargs):
        """`from_pretrained` of the library, after which every tensor of the model is known to come from the weights.

        Args:
            where: What holds the weights, where that is not `name`.
        """
        if name is not None:
            check_folder(name, {**kwargs, "output_loading_info": output_loading_info})
        try:
            model, info = super().from_pretrained(
                name, *model_args, ignore_mismatched_sizes=True, output_loading_info=True, **kwargs
            )
            check_placed(model.device, kwargs.get("device_map"))
            if output_loading_info:
                return model, info
            if name is not None or kwargs.get("state_dict"):  # an empty state_dict: all random on purpose
                check_loaded(where or name, info, ignore_mismatched_sizes)
                check_filled(where or name, model.named_parameters())
            return model
        except (ImportError, ValueError) as error:
            hub = {key: kwargs[key] for key in HUB_KWARGS if key in kwargs}
            config = {} if name is None else OpenVLAConfig.get_config_dict(name, **hub)[0]
            method = unknown_method(kwargs.get("quantization_config"), config)
            if method is None:
                raise
            raise ValueError(
                f"'{where or name}' is quantized by '{method}', which does not load here: {error} Taken are "
                f"{', '.join(KNOWN_METHODS)} (openvla quantize; openvla[quant]): give the model that it was made of."
            ) from error
        except TypeError as error:
            if "__init__() got an unexpected keyword argument" not in str(error):
                raise
            unknown = next((key for key in kwargs if f"'{key}'" in str(error)), "")
            fields = OpenVLAConfig().to_dict()
            said = f"from_pretrained does not know {unknown}={kwargs.get(unknown)!r:.100}."
            if unknown in fields and kwargs.get("config") is not None:
                said = f"{unknown}={kwargs[unknown]!r:.100} beside config=...: set it in the configuration."
            raise ValueError(said if unknown in fields else said + closest(unknown, {*fields, *LOADING})) from error

    def save_pretrained(self, save_directory, **kwargs):
        """Save weights under the published names, with the statistics beside them.

        A dataset_statistics.json of the folder is replaced (a warning says so if datasets of it are lost), but not by a
        model that has no statistics.
        """
        turn_block_scales_back(self)
        self._keep_action_tokens()
        folder, main = Path(save_directory), kwargs.get("is_main_process", True)
        before = _written(folder)
        super().save_pretrained(save_directory, **kwargs)
        if main and _written(folder) != before:  # in several files; the library would load an older single one
            (folder / WEIGHTS_FILES[0]).unlink(missing_ok=True)
        if main:
            self._save_statistics(folder)

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
        hub = {name: kwargs.pop(name) for name in HUB_KWARGS if name in kwargs} | (kwargs.get("adapter_kwargs") or {})
        kwargs["adapter_kwargs"] = hub  # the library takes them nowhere else
        folder = None if peft_model_id is None else local_folder(peft_model_id)
        if folder is not None and hub.get("subfolder"):
            peft_model_id = str(folder / hub.pop("subfolder"))  # transformers 5.4 looks only on the Hub into subfolders
        brought = {} if peft_model_id is None else read_belongings(peft_model_id, **hub)
        if (
            TRANSFORMERS < (5, 6)
            and peft_model_id is not None
            and "adapter_state_dict" not in kwargs
            and is_peft_available()
        ):
            # transformers 5.4 and 5.5 find the weights of an adapter only under "model." and leave all others random.
            from peft.utils import load_peft_weights

            where = {name: hub[name] for name in HUB_KWARGS if name in hub}
            kwargs["adapter_state_dict"] = {
                name.removeprefix("base_model.model."): weight
                for name, weight in load_peft_weights(peft_model_id, device="cpu", **where).items()
            }
        if brought.get("model") and peft_model_id is not None:
            parts = cached_file(peft_model_id, PARTS_FILE, **QUIET, **hub)
            self.load_parts(Path(parts).parent if parts else peft_model_id, brought["model"], owner=None)
        stored = kwargs.get("adapter_state_dict")
        if stored is None and peft_model_id is not None:
            stored = adapter_names(peft_model_id, hub)
        loaded = super().load_adapter(peft_model_id, adapter_name, *args, **kwargs)
        if stored is not None:
            self._check_complete(adapter_name or "default", with_adapter_name(stored, adapter_name or "default"))
        if "_parts_owner" in self.__dict__ and self.__dict__["_parts_owner"] is None:
            self.__dict__["_parts_owner"] = adapter_name or "default"
            for field in OF_MODEL:  # without it its parts predict nothing: the config says what they do
                setattr(self.config, field, copy.copy(brought["model"].get(field, getattr(self.config, field))))
        self._bring(adapter_name or "default", brought)
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

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # torch would make floats of whole numbers without their steps, silently with strict=False.
        few = [
            name
            for name, own in self.named_parameters()
            if not is_rounded(own) and (given := state_dict.get(f"{prefix}{name}")) is not None and is_rounded(given)
        ]
        if few:
            raise ValueError(
                f"{len(few)} weights, for example {few[0]}, are those of a quantized model, and this one is not: load "
                "the folder of that model with from_pretrained."
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def requires_grad_(self, requires_grad: bool = True):
        """As in every torch module; a `ValueError` where weights of few bits were to learn."""
        if requires_grad and any(map(is_rounded, self.parameters())):
            raise ValueError(
                "Weights of a quantized model do not learn: model.dequantize() gives plain layers back; or take the "
                "model that it was made of, or let adapters learn (openvla finetune --strategy qlora)."
            )
        return super().requires_grad_(requires_grad)

    def to(self, *args, **kwargs):
        """As in every torch module; a model that bitsandbytes quantized stays where it was loaded."""
        if getattr(self, "quantization_method", None) in (None, METHOD):
            return super().to(*args, **kwargs)
        given = [value for value in (*args, *kwargs.values()) if not isinstance(value, (bool, torch.memory_format))]
        given += [part for value in given if isinstance(value, torch.Tensor) for part in (value.device, value.dtype)]
        dtype = next((value for value in given if isinstance(value, torch.dtype)), None)
        device = next((torch.device(value) for value in given if isinstance(value, (str, int, torch.device))), None)
        if dtype is None and (device is None or device == self.device):
            return self
        raise ValueError(
            f"A quantized model cannot be moved or cast after loading (asked for {device or dtype}, it is on "
            f"{self.device}): its packed weights belong to one device and type. Choose both when loading, "
            f"from_pretrained(..., quantization_config=..., device_map={{'': '{device or self.device}'}}, dtype=...), "
            "and leave out .to()."
        )

    @property
    def device(self) -> torch.device:
        """Where inputs belong: where the model computes, also if its weights are offloaded and lie on "meta"."""
        device = next(parameter.device for parameter in self.parameters())
        if device.type == "meta":
            hooks = (getattr(module, "_hf_hook", None) for module in self.modules())  # of accelerate
            execution = (getattr(hook, "execution_device", None) for hook in hooks)
            return torch.device(next((where for where in execution if where is not None), device))
        return device


def _written(folder: Path) -> int | None:
    """When the index of weights in several files was written; None without one."""
    index = folder / f"{WEIGHTS_FILES[0]}.index.json"
    return index.stat().st_mtime_ns if index.is_file() else None


def _cast_unquantized(model: PreTrainedModel) -> None:
    """Of a folder that bitsandbytes quantized, transformers (5.4 to 5.24) leaves the matrices that it did not quantize
    in the type they are stored in, and casts the others as asked."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None and quantizer.pre_quantized and quantizer.quantization_config.quant_method != METHOD:
        for parameter in model.parameters():  # packed ones are of other classes, and may be of any type
            if type(parameter) is nn.Parameter and parameter.is_floating_point():
                parameter.data = parameter.data.to(model.config.dtype or parameter.dtype)


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
