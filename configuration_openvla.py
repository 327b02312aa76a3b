"""Configuration of OpenVLA: which vision towers, which language model, which action space.

`OpenVLAConfig` reads the published `config.json` of `openvla/openvla-7b`, `openvla/openvla-v01-7b` and everything
fine-tuned from them, and names three things those files leave implicit: the sizes of the towers
(`timm_model_kwargs`), the id of the image placeholder and the id of the empty token that ends a prompt.
"""

import copy
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, StrictDataclassError

from .choices_openvla import IMAGE_RESIZE_STRATEGIES, check_choice, nearest
from .files_openvla import local_folder, read_json
from .oft_openvla import HUB_KWARGS, OFTFolder, find_oft, oft_folder


MINIMUM_TRANSFORMERS = (5, 4)
TRANSFORMERS = tuple(int(part) for part in transformers.__version__.split(".")[:2])
if TRANSFORMERS < MINIMUM_TRANSFORMERS:
    raise ImportError(
        f"OpenVLA needs transformers >= {'.'.join(map(str, MINIMUM_TRANSFORMERS))}, found {transformers.__version__}: "
        "run `pip install -U transformers`."
    )


# Vision ids of the original: one (timm model, square image size in pixels, activation override) per tower. The
# override is what timm itself used when the published weights were trained, where a later timm may differ.
VISION_BACKBONES: dict[str, list[tuple[str, int, str | None]]] = {
    "clip-vit-l": [("vit_large_patch14_clip_224.openai", 224, "quick_gelu")],
    "clip-vit-l-336px": [("vit_large_patch14_clip_336.openai", 336, "quick_gelu")],
    "dinov2-vit-l": [("vit_large_patch14_reg4_dinov2.lvd142m", 224, None)],
    "in1k-vit-l": [("vit_large_patch16_224.augreg_in21k_ft_in1k", 224, None)],
    "siglip-vit-so400m": [("vit_so400m_patch14_siglip_224", 224, None)],
    "siglip-vit-so400m-384px": [("vit_so400m_patch14_siglip_384", 384, None)],
    "dinoclip-vit-l-336px": [
        ("vit_large_patch14_reg4_dinov2.lvd142m", 336, None),
        ("vit_large_patch14_clip_336.openai", 336, "quick_gelu"),
    ],
    "dinosiglip-vit-so-224px": [
        ("vit_large_patch14_reg4_dinov2.lvd142m", 224, None),
        ("vit_so400m_patch14_siglip_224", 224, None),
    ],
    "dinosiglip-vit-so-384px": [
        ("vit_large_patch14_reg4_dinov2.lvd142m", 384, None),
        ("vit_so400m_patch14_siglip_384", 384, None),
    ],
}

# Language-model ids of the original: (weights on the Hub, transformers model type).
LLM_BACKBONES: dict[str, tuple[str, str]] = {
    "llama2-7b-pure": ("meta-llama/Llama-2-7b-hf", "llama"),
    "llama2-13b-pure": ("meta-llama/Llama-2-13b-hf", "llama"),
    "llama2-7b-chat": ("meta-llama/Llama-2-7b-chat-hf", "llama"),
    "llama2-13b-chat": ("meta-llama/Llama-2-13b-chat-hf", "llama"),
    "vicuna-v15-7b": ("lmsys/vicuna-7b-v1.5", "llama"),
    "vicuna-v15-13b": ("lmsys/vicuna-13b-v1.5", "llama"),
    "mistral-v0.1-7b-pure": ("mistralai/Mistral-7B-v0.1", "mistral"),
    "mistral-v0.1-7b-instruct": ("mistralai/Mistral-7B-Instruct-v0.1", "mistral"),
    "phi-2-3b": ("microsoft/phi-2", "phi"),
}

DTYPES = ("bfloat16", "float16", "float32", "float64")
HEADS_WITH_WEIGHTS = ("l1_regression", "diffusion")
OURS = (  # fields that say what an action is, and which published files do not have
    "n_action_bins", "norm_stats", "action_head", "action_chunk", "action_dim", "proprio_dim", "constant_state",
    "prefix_training", "use_film", "normalization", "camera_names", "diffusion_steps",
)  # fmt: skip
UNITS = ("bounds_q99", "bounds")  # of normalized numbers


def check_model_type(content: dict[str, Any], where: str, expected: str) -> None:
    """Raise a `ValueError` if the config.json at `where` is not of the model type `expected`."""
    model_type = content.get("model_type")
    if model_type == expected:
        return
    if model_type is None and "vla" in content:
        raise ValueError(
            f"'{where}' is of a training run of the original's code: turn it into a Hub folder first, "
            "`openvla convert RUN OUT`."
        )
    found = "has no model_type" if model_type is None else f"describes a model of type {model_type!r}"
    raise ValueError(
        f"'{where}' {found}, expected '{expected}': give the folder of an OpenVLA model, with its own config.json."
    )


class OpenVLAConfig(transformers.PreTrainedConfig):
    """Everything needed to build an `OpenVLAForActionPrediction` except the weights.

    Args:
        vision_backbone_id: One of `VISION_BACKBONES`, which decides towers, image sizes and activations; or any name,
            if `timm_model_ids` and `image_sizes` describe the towers.
        llm_backbone_id: One of `LLM_BACKBONES`, which decides the class of `text_config` and the prompt form; or any
            name, if `text_config` describes the language model, `model_type` included.
        arch_specifier: Published field, kept as it is; the projector follows `use_fused_vision_backbone`.
        use_fused_vision_backbone: Two towers with concatenated features. Default: what `vision_backbone_id` implies.
        image_resize_strategy: `"resize-naive"`, `"resize-crop"` or `"letterbox"`.
        text_config: Configuration (or dict) of the language model.
        llm_max_length: Longest text prompt in tokens, patches not counted.
        pad_token_id: Default: that of `text_config`.
        pad_to_multiple_of: Rows by which the embedding table exceeds the tokenizer's own vocabulary, so that
            `text_config.vocab_size - pad_to_multiple_of` is the end of the action tokens.
        output_projector_states: Published field, kept as it is.
        norm_stats: `{dataset: {"action": {"q01", "q99", "mask", ...}}}`, the statistics that un-normalize actions.
        n_action_bins: Number of action tokens; they are the last ids of the tokenizer's own vocabulary.
        action_head: How actions come out of the language model: "tokens" (one after the other), or of OpenVLA-OFT, in
            one pass: "parallel_tokens", "l1_regression", "diffusion".
        action_chunk: Steps that one prediction is for.
        action_dim: Numbers of one action; needed by heads with weights ("l1_regression", "diffusion").
        proprio_dim: Numbers of the robot's state that the model sees beside the images; None: it sees none.
        constant_state: What a number of the state becomes that never changed in training: "zero", as in training, or
            "clip", -1 or 1, as in the evaluation of OpenVLA-OFT.
        prefix_training: Steps of a chunk that a head which predicts in one pass learned to be given, at most; 0: none.
        diffusion_steps: Of noise that a "diffusion" head was trained on.
        use_film: The words of the prompt scale and shift the features of every block of the towers (FiLM).
        normalization: `{dataset: "bounds_q99" | "bounds"}`: which statistics -1 and 1 stand for, q01 and q99 or min and
            max. A dataset that is not there: "bounds_q99".
        camera_names: What the model sees, one image of each in this order; see `cameras_openvla`.
        timm_model_ids, image_sizes: One name of timm and one side of a square in pixels per tower. Default: those of
            `vision_backbone_id`.
        timm_override_act_layers: One activation per tower, None for timm's own.
        hf_llm_id: Hub id of the language model, for tokenizer and model card. Default: that of `llm_backbone_id`.
        timm_model_kwargs: One dict per tower, passed on to `timm.create_model` (sizes of small models).
        image_token_id: Placeholder that stands for one image patch inside the model. Default: the last row of the
            embedding table, which no tokenizer of a published checkpoint uses.
        empty_token_id: Id of the lone word-boundary token `▁` that ends a prompt. Default: asked of the tokenizer.

    Raises:
        ValueError: If an id is unknown and what it would decide is not described, or the fields contradict each other.
    """

    model_type = "openvla"
    sub_configs: ClassVar = {"text_config": transformers.AutoConfig}

    # What is None here is filled in by `__post_init__`.
    vision_backbone_id: str = "siglip-vit-so400m"
    llm_backbone_id: str = "vicuna-v15-7b"
    arch_specifier: str | None = "no-align+gelu-mlp"
    use_fused_vision_backbone: bool = None  # type: ignore[assignment]
    image_resize_strategy: str = "letterbox"
    text_config: Any = None
    llm_max_length: int = 2048
    pad_token_id: int | None = None
    pad_to_multiple_of: int = 64
    output_projector_states: bool = False
    norm_stats: dict | None = None
    n_action_bins: int = 256
    action_head: str = "tokens"
    action_chunk: int = 1
    action_dim: int | None = None
    proprio_dim: int | None = None
    constant_state: str = "zero"
    prefix_training: int = 0
    diffusion_steps: int = 50
    use_film: bool = False
    normalization: dict = None  # type: ignore[assignment]
    camera_names: list = None  # type: ignore[assignment]
    timm_model_ids: list = None  # type: ignore[assignment]
    timm_override_act_layers: list = None  # type: ignore[assignment]
    image_sizes: list = None  # type: ignore[assignment]
    hf_llm_id: str | None = None
    timm_model_kwargs: list = None  # type: ignore[assignment]
    image_token_id: int = None  # type: ignore[assignment]
    empty_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        self.__dict__.update(_without_numpy(self.__dict__))
        for field in ("vision_backbone_id", "llm_backbone_id", "image_resize_strategy"):
            if not isinstance(getattr(self, field), str):
                raise ValueError(f"{field}={getattr(self, field)!r}: expected a text.")
        if not _is_dtype(self.dtype):
            raise ValueError(
                f"dtype={self.dtype!r}: expected a torch.dtype or the name of one, such as {', '.join(DTYPES)}, or "
                "'auto' for that of the stored weights."
            )
        given: Any = self.text_config
        if not isinstance(given, (dict, transformers.PreTrainedConfig, type(None))):
            raise ValueError(f"text_config={given!r}: expected the configuration of a language model.")
        if self.camera_names is None:
            self.camera_names = ["primary"]
        if self.normalization is None:
            self.normalization = {}
        self._complete_towers()
        self._complete_language_model()
        if self.pad_token_id is None:
            self.pad_token_id = self.text_config.pad_token_id
        if self.image_token_id is None:
            self.image_token_id = self.text_config.vocab_size - 1
        self.check_fields()
        super().__post_init__(**kwargs)

    def _complete_towers(self) -> None:
        """Fill in what `vision_backbone_id` decides and was not given."""
        if self.timm_model_ids is None or self.image_sizes is None:
            check_choice(
                "vision_backbone_id",
                self.vision_backbone_id,
                VISION_BACKBONES,
                "Towers of another name are described by timm_model_ids and image_sizes, one entry for each tower.",
            )
        if not isinstance(self.timm_model_ids, (list, tuple, type(None))):
            raise ValueError(f"timm_model_ids={self.timm_model_ids!r}: expected a list, one entry per tower.")
        if self.vision_backbone_id in VISION_BACKBONES:
            model_ids, sizes, activations = map(list, zip(*VISION_BACKBONES[self.vision_backbone_id]))
        else:
            model_ids, sizes, activations = self.timm_model_ids, self.image_sizes, [None] * len(self.timm_model_ids)
        if self.use_fused_vision_backbone is None:
            self.use_fused_vision_backbone = len(model_ids) > 1
        self.timm_model_ids = model_ids if self.timm_model_ids is None else self.timm_model_ids
        self.timm_override_act_layers = (
            activations if self.timm_override_act_layers is None else self.timm_override_act_layers
        )
        self.image_sizes = sizes if self.image_sizes is None else self.image_sizes
        if self.timm_model_kwargs is None:
            self.timm_model_kwargs = [{} for _ in self.timm_model_ids]

    def _complete_language_model(self) -> None:
        """Make `text_config` a configuration, with what `llm_backbone_id` decides."""
        fields = self.text_config if isinstance(self.text_config, dict) else {}
        described = isinstance(self.text_config, transformers.PreTrainedConfig) or "model_type" in fields
        if not described:
            check_choice(
                "llm_backbone_id",
                self.llm_backbone_id,
                LLM_BACKBONES,
                "A language model of another name is described by text_config, its model_type included.",
            )
        llm_on_hub, text_model_type = LLM_BACKBONES.get(self.llm_backbone_id, (None, None))
        self.hf_llm_id = llm_on_hub if self.hf_llm_id is None else self.hf_llm_id
        if self.text_config is None:
            # As the published training code had it: one padding token after the model's own vocabulary, the embedding
            # table then filled up by `pad_to_multiple_of` rows.
            vocabulary = transformers.CONFIG_MAPPING[text_model_type]().vocab_size
            self.text_config = {"vocab_size": vocabulary + self.pad_to_multiple_of, "pad_token_id": vocabulary}
        if isinstance(self.text_config, dict):
            fields = dict(self.text_config)
            model_type = fields.pop("model_type", text_model_type)
            if model_type not in transformers.CONFIG_MAPPING:
                raise ValueError(f"text_config: transformers knows no model_type {model_type!r}.")
            try:
                self.text_config = transformers.CONFIG_MAPPING[model_type](**fields)
            except (StrictDataclassError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
                raise ValueError(f"text_config does not describe a '{model_type}': {error}") from error
        if getattr(self.text_config, "num_attention_heads", None) is None:
            raise ValueError(
                f"text_config describes a '{self.text_config.model_type}', which has no attention "
                "(num_attention_heads) and with it no key-value cache to predict with: take a language model that has, "
                "such as llama, mistral, qwen3, gemma3_text or phi."
            )

    def check_fields(self) -> None:
        """Raise a `ValueError` if fields contradict each other."""
        check_choice("image_resize_strategy", self.image_resize_strategy, IMAGE_RESIZE_STRATEGIES)
        towers = 2 if self.use_fused_vision_backbone else 1
        for field in ("timm_model_ids", "timm_override_act_layers", "image_sizes", "timm_model_kwargs"):
            value = getattr(self, field)
            if not isinstance(value, (list, tuple)) or len(value) != towers:
                found = f"has {len(value)} entries" if isinstance(value, (list, tuple)) else f"is {value!r}, no list,"
                raise ValueError(
                    f"{field} {found} for {towers} vision tower(s): give one entry per tower, or leave it out to take "
                    f"what vision_backbone_id='{self.vision_backbone_id}' means."
                )
        if self.proprio_dim is not None and not _is_count(self.proprio_dim):
            raise ValueError(f"proprio_dim={self.proprio_dim!r}: expected a positive integer, or null without a state.")
        if self.action_dim is not None and not _is_count(self.action_dim):
            raise ValueError(f"action_dim={self.action_dim!r}: expected a positive integer.")
        if self.action_head in HEADS_WITH_WEIGHTS and self.action_dim is None:
            raise ValueError(f"action_head='{self.action_head}' has weights for action_dim numbers: give action_dim.")
        if not isinstance(self.use_film, bool) or (self.use_film and self.action_head == "tokens"):
            raise ValueError(
                f"use_film={self.use_film!r}, action_head='{self.action_head}': expected true or false, and FiLM is "
                "for heads that predict in one pass (parallel_tokens, l1_regression, diffusion)."
            )
        check_choice("constant_state", self.constant_state, ("zero", "clip"))
        if not isinstance(self.normalization, dict):
            raise ValueError(f"normalization={self.normalization!r}: expected {{dataset: 'bounds_q99' or 'bounds'}}.")
        for dataset, mode in self.normalization.items():
            check_choice(f"normalization of '{dataset}'", mode, UNITS)
        names = self.camera_names
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) and name for name in names):
            raise ValueError(f"camera_names={names!r}: expected a list of names, such as ['primary', 'wrist'].")
        if not names or len(set(names)) < len(names):
            raise ValueError(f"camera_names={names!r}: expected at least one camera, each once.")
        for field, kind in (("timm_model_ids", str), ("timm_model_kwargs", dict)):
            if not all(isinstance(entry, kind) for entry in getattr(self, field)):
                raise ValueError(f"{field}={getattr(self, field)!r}: expected a {kind.__name__} per tower.")
        if not all(_is_count(size) for size in self.image_sizes):
            raise ValueError(
                f"image_sizes={self.image_sizes!r}: expected the side of a square in pixels, one per tower."
            )
        for field in ("n_action_bins", "llm_max_length", "pad_to_multiple_of", "action_chunk", "diffusion_steps"):
            value = getattr(self, field)
            if not (_is_count(value) or (field == "pad_to_multiple_of" and value == 0)):
                raise ValueError(f"{field}={value!r}: expected a positive integer.")
        if self.prefix_training not in range(self.action_chunk) or isinstance(self.prefix_training, bool):
            raise ValueError(
                f"prefix_training={self.prefix_training!r}: expected 0, or fewer steps than the {self.action_chunk} of "
                "a chunk (action_chunk)."
            )
        if not 2 <= self.n_action_bins <= self.action_vocab_size:
            raise ValueError(
                f"n_action_bins={self.n_action_bins} does not fit a vocabulary of {self.action_vocab_size} tokens "
                f"(text_config.vocab_size={self.text_config.vocab_size}, pad_to_multiple_of={self.pad_to_multiple_of})."
            )
        if not (self.pad_token_id is None or self.pad_token_id == 0 or _is_count(self.pad_token_id)):
            raise ValueError(f"pad_token_id={self.pad_token_id!r}: expected the id of a token.")
        for field in ("image_token_id", "empty_token_id"):
            value = getattr(self, field)
            if value is not None and not (type(value) is int and 0 <= value < self.text_config.vocab_size):
                raise ValueError(
                    f"{field}={value!r} is no id of a vocabulary of {self.text_config.vocab_size} tokens "
                    "(text_config.vocab_size)."
                )

    # Reading ----------------------------------------------------------------------------------------------------------

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> tuple[dict, dict]:
        """Content of the config.json of a folder or Hub id (or of that file itself), and unused arguments.

        Of a folder of OpenVLA-OFT with what its parts say; `base` in `kwargs` is then what its adapter was trained on.

        Raises:
            FileNotFoundError: If there is neither folder nor repository, or no config.json in it.
            ValueError: If config.json is damaged, a Git LFS pointer or of another kind of model, or the parts of an
                OpenVLA-OFT folder do not tell what it is.
        """
        name, subfolder = os.fspath(pretrained_model_name_or_path), kwargs.get("subfolder") or ""
        file = Path(name)
        if file.suffix != ".json" or not file.is_file():
            check_reachable(name, {key: kwargs[key] for key in HUB_KWARGS if key in kwargs})
            if (oft := find_oft(oft_folder(name, **kwargs), kwargs.get("action_head"))) is not None:
                return cls._of_oft(oft, kwargs)
            folder = local_folder(name)
            file = Path(folder or name, subfolder, "config.json")
            if folder is not None and not file.is_file():
                raise FileNotFoundError(no_config(file.parent))
        if file.is_file():
            read_json(file, marked=False)  # says what is wrong with it
        try:
            content, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        except OSError as error:
            if file.is_file():
                raise
            raise FileNotFoundError(
                f"'{name}' is neither a folder here nor a Hub repository that can be reached: {error}"
            ) from error
        if not set(content) - {"_commit_hash"} and not file.is_file():
            raise FileNotFoundError(no_config(name))
        check_model_type(content, str(file), cls.model_type)
        _warn_of_spelling(content, str(file))
        for field in ("dtype", "torch_dtype"):
            if content.get(field) is not None:
                check_choice(f"{field} of '{file}'", content[field], DTYPES)
        fewer = content.get("quantization_config")
        if fewer is not None and not (isinstance(fewer, Mapping) and isinstance(fewer.get("quant_method", ""), str)):
            raise ValueError(
                f"quantization_config of '{file}' is {fewer!r:.100}: expected an object that names its quant_method."
            )
        return content, unused

    @classmethod
    def _of_oft(cls, oft: OFTFolder, given: dict[str, Any]) -> tuple[dict, dict]:
        """`get_config_dict` of a folder of OpenVLA-OFT."""
        base = oft.find_base(given.pop("base", None))
        given = {key: value for key, value in given.items() if key not in HUB_KWARGS}
        config = oft.folder / "config.json"
        if base is None and not config.is_file():
            raise FileNotFoundError(no_config(oft.folder))
        content, unused = cls.get_config_dict(config if base is None else base, **given)
        content |= oft.fields(given)
        if isinstance(unused.get("normalization"), str):  # one name for all datasets
            unused["normalization"] = content["normalization"]
        return content, unused

    def to_dict(self) -> dict[str, Any]:
        """As in every configuration of the library; arrays among `norm_stats` become lists."""
        content = super().to_dict()
        return content | {"norm_stats": plain_statistics(content["norm_stats"])} if "norm_stats" in content else content

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """As in every configuration of the library; `auto_map` names only code that is in the folder."""
        config = copy.copy(self)
        config.__dict__.pop("auto_map", None)
        found = code_in(save_directory, getattr(self, "auto_map", None) or {})
        if found:
            config.auto_map = found
        super(OpenVLAConfig, config).save_pretrained(save_directory, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As in every configuration of the library; fields given by name are checked as well."""
        try:
            loaded = super().from_dict(config_dict, **_without_numpy(kwargs))
        except StrictDataclassError as error:
            raise ValueError(f"A field of the configuration is of the wrong type: {error}") from error
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        config.check_fields()
        return loaded

    @property
    def action_vocab_size(self) -> int:
        """End of the tokenizer's own vocabulary; the last `n_action_bins` ids before it are the action tokens."""
        return self.text_config.vocab_size - self.pad_to_multiple_of


def _warn_of_spelling(content: Mapping[str, Any], where: str) -> None:
    """Say which fields are nearly some of ours: the library keeps any name, and the field that was meant is left as it
    is by default."""
    for name in (name for name in content if not hasattr(OpenVLAConfig, name)):
        near = nearest(name, OURS)
        if near and near not in content:
            warnings.warn(f"'{where}': '{name}' is no field, and decides nothing. Did you mean '{near}'?", stacklevel=4)


def code_in(folder: str | os.PathLike, auto_map: Mapping[str, Any]) -> dict[str, str]:
    """Those entries of an `auto_map` whose module lies in `folder`, without the repository they may name."""
    local = {name: str(target).rpartition("--")[2] for name, target in auto_map.items()}
    return {name: target for name, target in local.items() if (Path(folder) / f"{target.split('.')[0]}.py").is_file()}


def plain_statistics(statistics: Any) -> Any:
    """Statistics as a JSON file holds them: lists in place of arrays and tensors."""

    def plain(value: Any) -> Any:
        if not hasattr(value, "tolist"):
            raise TypeError(f"norm_stats holds {value!r} ({type(value).__name__}), expected numbers, lists and texts.")
        return value.tolist()

    return json.loads(json.dumps(statistics, default=plain))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _without_numpy(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The same fields, numbers and arrays of numpy as those of Python: config.json holds no others."""
    return {
        name: value.tolist() if isinstance(value, (np.generic, np.ndarray)) else value for name, value in fields.items()
    }


def _is_dtype(value: Any) -> bool:
    """Whether it is a `torch.dtype`, the name of one, or what the library makes one of."""
    named = getattr(torch, value, None) if isinstance(value, str) else value
    return named is None and not isinstance(value, str) or value == "auto" or isinstance(named, (torch.dtype, dict))


def check_reachable(name: str | os.PathLike, hub: Mapping[str, Any]) -> None:
    """Ask the Hub for one file of a model of which none is here: without a network its library tries each file for half
    a minute, and several are looked for that a model may have or not.

    Raises:
        FileNotFoundError: If `name` is neither a folder nor can be reached.
    """
    from transformers.utils import cached_file  # not before its version was looked at

    name, place = os.fspath(name), {key: hub.get(key) for key in ("cache_dir", "revision")}
    if local_folder(name) is not None:
        return
    try:
        if not any(try_to_load_from_cache(name, file, **place) for file in ("config.json", "adapter_config.json")):
            cached_file(name, "config.json", **hub)
    except (OSError, HFValidationError) as error:  # others are those of whoever reads the file that counts
        if isinstance(error.__cause__, LocalEntryNotFoundError):
            raise FileNotFoundError(
                f"'{name}' is neither a folder here nor a Hub repository that can be reached: {error}"
            ) from error


def no_config(folder: str | os.PathLike) -> str:
    """What to say where config.json is missing, by what is there instead."""
    message = f"There is no config.json in '{os.fspath(folder)}', so nothing says which model it is"
    if (Path(folder) / "adapter_config.json").is_file():
        return f"{message}: it holds a LoRA adapter. Give its base, or merge the two first (`openvla merge RUN OUT`)."
    if any(Path(folder).glob("checkpoints/*.pt")):
        return f"{message}: it is a training run of the original's code, see `openvla convert`."
    if any(Path(folder).glob("*.onnx")):
        return f"{message}: it is an export to ONNX, which openvla_runtime.OnnxPolicy acts with; give its model."
    return f"{message}: was it copied or downloaded in full?"


__all__ = ["OpenVLAConfig", "plain_statistics"]
