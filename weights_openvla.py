"""What has to be right before weights are trusted: files that are complete, and every tensor of the model among them.

`from_pretrained` of the library leaves random what a checkpoint lacks and passes over what it does not know. A policy
with random parts still moves the arm: here both are errors that say what happened to the weights.
"""

import os
import zipfile
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open

from .files_openvla import check_file, local_folder, read_json


WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin")  # in the order in which the library looks for them
LOADING = (  # arguments of `from_pretrained` that scripts give, for a hint at a misspelt one
    "adapter_name", "attn_implementation", "cache_dir", "config", "device_map", "dtype", "load_in_4bit", "load_in_8bit",
    "low_cpu_mem_usage", "max_memory", "offload_folder", "quantization_config", "revision", "state_dict", "subfolder",
    "token", "torch_dtype", "trust_remote_code", "use_safetensors",
)  # fmt: skip
OLDER = {  # arguments that transformers knew before version 5, and what says it today
    "use_flash_attention_2": "attn_implementation='flash_attention_2'",
    "use_auth_token": "token=...",
    "resume_download": "nothing, downloads are always resumed",
}
# Files of tensors that are no weights of a model, by the beginning of their names
NO_WEIGHTS = ("adapter_", "optimizer", "rng_state", "scheduler", "training_args")
_SAVE = "safetensors.torch.save_file(tensors, file, {'format': 'pt'})"
# What a part of an unexpected name says about where the weights come from; the first that is found is told.
_OFT = "they hold parts of OpenVLA-OFT, which loads from the folder it was saved in, with its *_checkpoint.pt files"
_PEFT = "a PEFT model was saved unmerged: save model.merge_and_unload() instead"
_BITSANDBYTES = "they are quantized by bitsandbytes, and config.json has no quantization_config"
_ORIGINAL = "they have the names of the original's training code: see `openvla convert`"
_VALUES = f"a value head of reinforcement learning was saved beside the policy: save the other tensors alone ({_SAVE})"
ORIGINS = {
    "action_head": _OFT,
    "proprio_projector": _OFT,
    "vision_backbone.vision_backbone.": _OFT,
    ".block.": _OFT,  # FiLM
    "lora_": _PEFT,
    ".base_layer.": _PEFT,
    "modules_to_save.": _PEFT,
    "base_model.model.": f"{_PEFT}, or remove the prefix 'base_model.model.' of all names",
    "_orig_mod.": "a model was saved from torch.compile: save the model inside, or remove '_orig_mod.' from all names",
    "_fsdp_wrapped_module.": "a model was saved from FSDP: gather its full state dict first",
    "_checkpoint_wrapped_module.": "a model was saved with wrappers for checkpointing: remove them from all names",
    "module.": "a model was saved from DistributedDataParallel: save model.module, or remove 'module.' from all names",
    ".gamma": "LayerScale has timm's name: rename '.gamma' to '.scale_factor'",
    "llm_backbone.": _ORIGINAL,
    "_featurizer.": _ORIGINAL,
    ".absmax": _BITSANDBYTES,
    ".SCB": _BITSANDBYTES,
    "value_head.": _VALUES,
    "v_head.": _VALUES,
}


# Files ----------------------------------------------------------------------------------------------------------------


def with_variant(name: str, variant: str | None) -> str:
    """How the library names a file of weights of a `variant`: "model.safetensors" is "model.fp16.safetensors"."""
    stem, ending = name.rsplit(".", 1)
    return f"{stem}.{variant}.{ending}" if variant else name


def find_weight_files(folder: Path, names: Iterable[str] = WEIGHTS_FILES, variant: str | None = None) -> list[Path]:
    """The weight files of a folder that the library would take, in order; empty if there are none.

    Raises:
        FileNotFoundError: If a shard that the index names is missing.
        ValueError: If the index is damaged, or there are weights in one file and in several.
    """
    for name in names:
        single = folder / with_variant(name, variant)
        index = folder / with_variant(f"{name}.index.json", variant)
        if single.is_file():
            shards = []
            with suppress(ValueError):  # a damaged index is not needed
                shards = _shards(index) if index.is_file() else []
            if shards and single not in shards and all(file.is_file() for file in shards):
                raise ValueError(
                    f"'{folder}' holds weights twice, in {single.name} and in {shards[0].name}, ...: one of the two is "
                    f"older, and the library would take {single.name}. Remove the older ones."
                )
            return [single]
        if index.is_file():
            shards = _shards(index)
            missing = [file.name for file in shards if not file.is_file()]
            if missing:
                raise FileNotFoundError(
                    f"'{folder}' lacks {', '.join(missing)}, which its {index.name} names: copy or download them, too."
                )
            return shards
    return []


def _shards(index: Path) -> list[Path]:
    """The files that an index names, in order; a `ValueError` if it is damaged."""
    shards = read_json(index, marked=False).get("weight_map")
    if not isinstance(shards, Mapping) or not shards:
        raise ValueError(f"'{index}' has no weight_map: it was damaged, copy or download it again.")
    names = sorted({str(shard) for shard in shards.values()})
    if outside := [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]:
        raise ValueError(
            f"'{index}' names '{outside[0]}', which is not in its folder: put all parts of the weights there."
        )
    return [index.parent / name for name in names]


def check_weight_file(file: Path, whole_numbers: bool = False) -> None:
    """Raise a `ValueError` if a file is empty, a Git LFS pointer, cut off, damaged, or of whole numbers; only its ends
    are read.

    Args:
        whole_numbers: They are right: the model is quantized, or the caller looks at the tensors.
    """
    check_file(file, "weights file")
    damaged = f"'{file}' is damaged or cut off ({file.stat().st_size:,} bytes): copy or download it again."
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt") as tensors:
                types = {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{damaged} {error}") from error
        whole = [name for name, kind in types.items() if not kind.startswith(("F", "BF"))]
        if whole and not whole_numbers:
            raise ValueError(
                f"'{file}' holds {len(whole)} tensor(s) of whole numbers, for example {whole[0]} ({types[whole[0]]}), "
                "and config.json has no quantization_config that says what they mean: take the config.json they were "
                "saved with, or weights of a floating-point type."
            )
    else:
        with file.open("rb") as stream:
            zipped = stream.read(2) == b"PK"  # as torch saves today; its older form has no end that could be missing
        if zipped and not zipfile.is_zipfile(file):
            raise ValueError(damaged)


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder's safetensors files, mapped from disk.

    Raises:
        FileNotFoundError: If there are none, or one is missing.
        ValueError: If one is damaged or a Git LFS pointer.
    """
    files = find_weight_files(folder, WEIGHTS_FILES[:1])
    if not files:
        unmerged = (
            " Or was its adapter not merged? Then take config.json away and say base=..., what it was trained on."
            if (folder / "lora_adapter").is_dir()
            else ""
        )
        raise FileNotFoundError(
            f"'{folder}' holds no {WEIGHTS_FILES[0]} and no index of its parts: copy the weights.{unmerged}"
        )
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        check_weight_file(file)
        with safe_open(file, framework="pt") as stored:
            tensors |= {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - not a dict
    return tensors


def check_folder(name: str | os.PathLike, loading: Mapping[str, Any]) -> None:
    """Raise an error that names the file, if a local folder cannot be loaded because of a missing or damaged one.

    Args:
        name: A folder, or a Hub id, whose files the library downloads and checks.
        loading: The arguments of `from_pretrained`.

    Raises:
        FileNotFoundError: If `name` is neither folder nor Hub id, or there are no weights, or not all of an index.
        ValueError: If a weight file or generation_config.json is damaged or a Git LFS pointer.
    """
    folder = local_folder(name)
    if folder is None:
        return
    folder /= loading.get("subfolder") or ""
    if (folder / "generation_config.json").is_file():
        read_json(folder / "generation_config.json", marked=False)  # the library passes over one that it cannot read
    if loading.get("gguf_file") or loading.get("state_dict") is not None:
        return
    asked = {None: WEIGHTS_FILES, True: WEIGHTS_FILES[:1], False: WEIGHTS_FILES[1:]}
    names = asked.get(loading.get("use_safetensors"), WEIGHTS_FILES)
    config = folder / "config.json"
    quantized = config.is_file() and bool(read_json(config).get("quantization_config"))  # {} says nothing
    files = find_weight_files(folder, names, loading.get("variant"))
    if not files and folder.is_dir():
        raise FileNotFoundError(_no_weights(folder, names, loading.get("variant")))
    for file in files:
        check_weight_file(file, quantized or bool(loading.get("output_loading_info")))


def _no_weights(folder: Path, names: Iterable[str], variant: str | None) -> str:
    """What to say where there are no weights under the names that were asked for, by what is there instead."""
    wanted = " or ".join(with_variant(name, variant) for name in names)
    kinds = ("model*.safetensors", "pytorch_model*.bin"), ("*.safetensors", "*.pt", "*.pth", "*.bin")
    usual, others = (sorted({file.name for kind in kind for file in folder.glob(kind)}) for kind in kinds)
    others = [name for name in others if not name.startswith(NO_WEIGHTS)]
    found = f"there are {', '.join(usual[:3])}: say so by variant=... and use_safetensors=..." if usual else ""
    if any("-of-" in name for name in usual) and not any(folder.glob("*.index*.json")):
        found = f"there are {usual[0]}, ..., and no index of these parts: copy its model.safetensors.index.json, too"
    elif others and not usual:
        found = f"there are {', '.join(others[:3])}: save their tensors as model.safetensors ({_SAVE})"
    if any(folder.glob("*.onnx")):
        found = "it is an export to ONNX: openvla_runtime.OnnxPolicy acts with it (packages/openvla-runtime)"
    return f"'{folder}' holds no {wanted}; {found or 'copy or download the weights'}."


# Tensors --------------------------------------------------------------------------------------------------------------


def check_tensors(
    where: str,
    missing: Collection[str],
    unexpected: Collection[str],
    mismatched: Mapping[str, tuple[Any, Any]],
    advice: str = "",
) -> None:
    """Raise a `ValueError` that says how many tensors are wrong, names the first, and tells the likely cause.

    Args:
        where: What holds the weights.
        missing, unexpected: Names of the tensors that the model has and the weights lack, and the other way round.
        mismatched: Name -> shape in the weights, and the shape that the model has.
        advice: What else can be done about it.
    """
    shapes = [f"{name} {list(found)} instead of {list(expected)}" for name, (found, expected) in mismatched.items()]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    lines = []
    for problem, names in problems.items():
        if names:
            shown = ", ".join(sorted(names)[:4])
            lines.append(f"{len(names)} {problem}: {shown}{', ...' if len(names) > 4 else ''}")
    if lines:
        cause = _likely_cause(missing, unexpected, mismatched)
        raise ValueError(
            f"{where} does not fit the configuration. Tensors {'; '.join(lines)}. Likely cause: {cause}."
            + (f" {advice}" if advice else "")
        )


def check_loaded(
    where: str | os.PathLike | None, info: Mapping[str, Any], ignore_mismatched_sizes: bool = False
) -> None:
    """Raise a `ValueError` if the library's loading info tells of tensors that are random or were left out."""
    mismatched = {name: (found, expected) for name, found, expected in info["mismatched_keys"]}
    check_tensors(
        _holder(where),
        info["missing_keys"],
        info["unexpected_keys"],
        {} if ignore_mismatched_sizes else mismatched,
        "To train from them all the same: ignore_mismatched_sizes=True lets tensors of another shape begin at random, "
        "output_loading_info=True returns the names instead of this error.",
    )


def check_filled(where: str | os.PathLike | None, parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Raise a `ValueError` if matrices hold one value throughout: a file that was allocated and never filled. Of each a
    few values are read, all where these are equal; quantized and offloaded ones are passed over.

    Args:
        where: What holds the weights; None for a given state_dict.
        parameters: Names and tensors.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true") and os.environ.get("LOCAL_RANK", "0") != "0":
        return  # accelerate sends the weights of the first process later
    constant = []
    for name, parameter in parameters:
        values = parameter.detach()
        # Biases may be zero throughout, also where experts have theirs side by side.
        is_matrix = type(parameter.data) is torch.Tensor and values.ndim > 1 and not name.endswith("bias")
        if is_matrix and values.numel() > 1 and not values.is_meta:
            flat = values.flatten()
            few = flat[:: max(1, len(flat) // 64)]
            if bool((few == few[0]).all()) and bool((flat == flat[0]).all()):
                constant.append(f"{name} ({float(flat[0]):g})")
    if constant:
        raise ValueError(
            f"{_holder(where)} holds {len(constant)} matrices of one value throughout: {', '.join(constant[:4])}"
            f"{', ...' if len(constant) > 4 else ''}. Likely cause: a file that was allocated and never filled, by a "
            "download or a copy that broke off: copy or download it again."
        )


def check_placed(device: torch.device, device_map: Any) -> None:
    """Raise a `ValueError` if weights stayed on disk and nothing brings them back (transformers 5.4 and 5.5).

    Args:
        device: Where the model computes.
        device_map: As given to `from_pretrained`.
    """
    if device.type == "meta" and device_map is not None and "meta" not in str(device_map):
        raise ValueError(
            f"device_map={device_map!r} leaves all weights on disk, from where transformers {transformers.__version__} "
            'does not bring them back: put one part on "cpu", for example device_map={"vision_backbone": "cpu", '
            '"projector": "disk", "language_model": "disk"}, or use transformers >= 5.17.'
        )


def _holder(where: str | os.PathLike | None) -> str:
    return "The given state_dict" if where is None else f"'{os.fspath(where)}'"


def _likely_cause(missing: Collection[str], unexpected: Collection[str], mismatched: Collection[str]) -> str:
    """Why names do not agree, as far as they tell."""
    for part, origin in ORIGINS.items():
        if any(part in name for name in unexpected):
            return origin
    for name in unexpected:
        for known in missing:
            if name.endswith(known):
                return (
                    f"names begin with '{name.removesuffix(known)}': save the model without it, or remove it from all"
                )
    if not unexpected and not mismatched:
        return "the weights are incomplete (a weight file is missing, or only a part of the model was saved)"
    return "config.json is of another model or was changed (backbone ids, text_config, timm_model_kwargs)"


__all__ = [
    "check_filled",
    "check_folder",
    "check_loaded",
    "check_placed",
    "check_tensors",
    "check_weight_file",
    "find_weight_files",
    "read_tensors",
    "with_variant",
]
