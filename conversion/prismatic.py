"""Checkpoints of the original's training code <-> Hub folders."""

import os
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from transformers import PreTrainedTokenizerFast
from transformers.utils import cached_file

from ..action_tokenizer import read_statistics
from ..choices_openvla import check_choice, closest
from ..configuration_openvla import LLM_BACKBONES, VISION_BACKBONES, OpenVLAConfig
from ..files_openvla import read_json
from ..folders import new_folder, write_json
from ..hub import model_folder, statistics_of
from ..image_processing_openvla import OpenVLAImageProcessor
from ..presets import load_base_vlms
from ..processing_openvla import OpenVLAProcessor, prompt_template_of
from .hub_folder import (
    DTYPES,
    LazyTensor,
    check_replaced,
    check_unquantized,
    check_weights,
    expected_shapes,
    read_as,
    read_weights,
    write_companions,
    write_weights,
)
from .training_run import (
    LATEST,
    PARTS,
    SHOWN,
    SIZES,
    config_of_run,
    find_checkpoint,
    lazy,
    name_table,
    pixels_of_run,
    read_checkpoint,
    rename,
    run_ids,
)


# Where the defaults of the transformers configuration classes (7B) are not the sizes of the id.
_LLM_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
LLM_SIZES: dict[str, dict[str, Any]] = {
    "llama2-13b-pure": _LLM_13B,
    "llama2-13b-chat": _LLM_13B,
    "vicuna-v15-13b": _LLM_13B,
    "phi-2-3b": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "partial_rotary_factor": 0.4,
    },
}
# Fields of a config.json that belong to its folder, and not to the model
OF_FOLDER = ("_name_or_path", "architectures", "auto_map", "dtype", "norm_stats", "transformers_version")


# To a Hub folder ------------------------------------------------------------------------------------------------------


def convert_prismatic_checkpoint(
    checkpoint: str | os.PathLike,
    output: str | os.PathLike,
    *,
    vision_backbone_id: str | None = None,
    llm_backbone_id: str | None = None,
    image_resize_strategy: str | None = None,
    config: OpenVLAConfig | None = None,
    tokenizer: str | os.PathLike | None = None,
    statistics: str | os.PathLike | None = None,
    base: str | os.PathLike | None = None,
    dtype: str = "bfloat16",
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint of the original's training code as a self-contained Hub folder.

    The checkpoint stays on disk; one shard is in memory at a time. Every name and shape is compared with what the
    configuration calls for before anything is written. A model that was trained with random crops (`image_aug` in the
    run's config.json) gets the pixels of the original's evaluation of such models, others the published ones.

    Args:
        checkpoint: A .pt file, or the folder of its run.
        output: Folder to write; it appears complete or not at all.
        vision_backbone_id, llm_backbone_id, image_resize_strategy: Default: what the run's config.json says.
        config: Instead of the three, for models of other sizes. Default: what an exported run says.
        tokenizer: Folder or Hub id of the language model's tokenizer. Default: the language model's own Hub repository.
        statistics: dataset_statistics.json. Default: the one in the run's folder.
        base: What supplies the parts that were frozen in training and are not in the checkpoint: another checkpoint or
            run, a Hub folder or id, or "timm" for vision towers as timm publishes them.
        dtype: "bfloat16" as published, "float16" or "float32".
        max_shard_size: Largest weight file, for example "5GB".
        overwrite: Replace the model files of an existing folder.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: If checkpoint, statistics or tokenizer are not there.
        ValueError: If ids are unknown, a part is missing, weights do not fit, or `output` is not empty.
    """
    check_choice("dtype", dtype, DTYPES)
    file, run = find_checkpoint(checkpoint)
    stats_file = Path(statistics) if statistics is not None else run / "dataset_statistics.json"
    if not stats_file.is_file():
        raise FileNotFoundError(
            f"No action statistics at '{stats_file}': give the dataset_statistics.json of the training (--statistics)."
        )
    given = {
        "vision_backbone_id": vision_backbone_id,
        "llm_backbone_id": llm_backbone_id,
        "image_resize_strategy": image_resize_strategy,
    }
    if config is None and not any(given.values()):
        config = config_of_run(run)
    told = config is not None
    if config is None:
        config = config_of_ids(run_ids(run) | {field: value for field, value in given.items() if value}, run)
    parts = read_checkpoint(file)
    tensors = lazy(parts, config)
    missing = [part for part in PARTS if part not in parts]
    if missing:
        tensors |= frozen_parts(missing, base, config, file)
    fast_tokenizer = prepare_tokenizer(tokenizer or str(config.hf_llm_id), config)
    fit_vocabulary(config, tensors, fast_tokenizer, told)
    check_weights(config, {name: tensor.shape for name, tensor in tensors.items()}, f"'{file}'")

    config.dtype = dtype
    processor = OpenVLAProcessor(image_processor_of(config), fast_tokenizer, prompt_template_of(config.to_dict()))
    if not config.llm_backbone_id.endswith("-pure") and not config.llm_backbone_id.startswith("vicuna"):
        warnings.warn(
            f"The original trains {config.llm_backbone_id} with a prompt form of its own, which is not known here: "
            f"processor_config.json of '{output}' has {processor.prompt_template!r}. Replace its prompt_template.",
            stacklevel=2,
        )
    if shown := pixels_of_run(run):
        processor = processor.with_pixels(**shown)
    output = Path(output)
    check_replaced(output, run, "model_type", "a model")
    with new_folder(output, overwrite) as folder:
        write_weights(folder, tensors, DTYPES[dtype], max_shard_size)
        write_companions(folder, config, processor, read_statistics(stats_file), name=output.resolve().name)
    return output


def config_of_ids(ids: Mapping[str, Any], run: Path) -> OpenVLAConfig:
    """Configuration of backbone ids, with the sizes they stand for."""
    lacking = [
        field for field in ("vision_backbone_id", "llm_backbone_id", "image_resize_strategy") if field not in ids
    ]
    if lacking:
        said = ""
        if (run / "config.json").is_file():
            base_vlm = (read_json(run / "config.json").get("vla") or {}).get("base_vlm")
            said = f" (its base_vlm is '{base_vlm}'.{closest(base_vlm, load_base_vlms())})" if base_vlm else ""
        options = ", ".join("--" + field.replace("_", "-") for field in lacking)
        raise ValueError(f"The config.json of '{run}' does not tell {', '.join(lacking)}{said}: give {options}.")
    check_choice("vision_backbone_id", ids["vision_backbone_id"], VISION_BACKBONES)
    check_choice("llm_backbone_id", ids["llm_backbone_id"], LLM_BACKBONES)
    fused = len(VISION_BACKBONES[ids["vision_backbone_id"]]) > 1
    config = OpenVLAConfig(**ids, arch_specifier=f"no-align+{'fused-' if fused else ''}gelu-mlp")
    sizes = LLM_SIZES.get(ids["llm_backbone_id"])
    if sizes:
        text = {"model_type": config.text_config.model_type, "vocab_size": config.text_config.vocab_size, **sizes}
        config = OpenVLAConfig(**ids, arch_specifier=config.arch_specifier, text_config=text)
    return config


def frozen_parts(
    missing: list[str], base: str | os.PathLike | None, config: OpenVLAConfig, file: Path
) -> dict[str, LazyTensor]:
    """Tensors of the parts a checkpoint lacks, from `base`."""
    if base is None:
        raise ValueError(
            f"'{file}' lacks {' and '.join(missing)}: frozen in training, they were not saved. Give what the training "
            "started from (--base): a checkpoint, a Hub folder or id, or 'timm' for the vision towers timm publishes."
        )
    if str(base) == "timm":
        found = timm_towers(config)
    elif Path(base).suffix == ".pt" or (Path(base) / "checkpoints").is_dir():
        found = lazy(read_checkpoint(find_checkpoint(base)[0]), config)
    else:
        found = read_weights(model_folder(base))
    published = {"vision_backbone": "vision_backbone.", "projector": "projector.", "llm_backbone": "language_model."}
    wanted = tuple(published[part] for part in missing)
    for part in missing:
        if not any(name.startswith(published[part]) for name in found):
            raise ValueError(f"base='{base}' does not hold {part} either, which '{file}' lacks.")
    return {name: tensor for name, tensor in found.items() if name.startswith(wanted)}


def timm_towers(config: OpenVLAConfig) -> dict[str, LazyTensor]:
    """Vision towers with the weights timm publishes, downloaded where they are not cached."""
    tensors = {}
    names = ("featurizer", "fused_featurizer")
    for tower, model_id, size in zip(names, config.timm_model_ids or [], config.image_sizes or [], strict=False):
        state = timm.create_model(model_id, pretrained=True, num_classes=0, img_size=size).state_dict()
        for name, tensor in state.items():
            published = rename(f"vision_backbone.{tower}.{name}", [])
            tensors[published] = LazyTensor.of(tensor)
    return tensors


def prepare_tokenizer(source: str | os.PathLike, config: OpenVLAConfig) -> PreTrainedTokenizerFast:
    """Tokenizer of a language model with the padding token that the original added."""
    try:
        cached_file(source, "tokenizer.json")
    except OSError as error:
        raise FileNotFoundError(
            f"No fast tokenizer (tokenizer.json) at '{source}': give a folder or Hub id that has the tokenizer of "
            f"'{config.llm_backbone_id}' (--tokenizer); published OpenVLA repositories do."
        ) from error
    tokenizer = PreTrainedTokenizerFast.from_pretrained(source, padding_side="right")
    tokenizer.add_special_tokens({"pad_token": "<|pad|>" if config.llm_backbone_id.startswith("phi") else "<PAD>"})
    tokenizer.model_max_length = config.llm_max_length
    return tokenizer


def fit_vocabulary(
    config: OpenVLAConfig, tensors: Mapping[str, LazyTensor], tokenizer: PreTrainedTokenizerFast, told: bool = False
) -> None:
    """Set vocabulary and padding of `config`: the original filled the embedding table up to a multiple of 64 rows.

    Args:
        told: `config` is that of the model, which may have a table of another size, as the embedded policy does.
    """
    embedding = tensors.get("language_model.model.embed_tokens.weight")
    if embedding is None:
        return  # the check of the weights says so
    rows, expected = embedding.shape[0], -(-len(tokenizer) // 64) * 64
    of_config = told and rows == config.text_config.vocab_size and len(tokenizer) == config.action_vocab_size + 1
    if rows != expected and of_config:
        return
    if rows != expected:
        raise ValueError(
            f"The checkpoint has {rows} embeddings, but a tokenizer of {len(tokenizer)} tokens, padding included, "
            f"makes {expected}: '{tokenizer.name_or_path}' is not that of its training, give --tokenizer."
        )
    config.text_config.vocab_size = rows
    config.text_config.pad_token_id = config.pad_token_id = tokenizer.pad_token_id
    config.pad_to_multiple_of = rows - tokenizer.vocab_size
    config.image_token_id = rows - 1


def image_processor_of(config: OpenVLAConfig) -> OpenVLAImageProcessor:
    """Image processor of the towers: input sizes from the configuration, colors and interpolation as timm has them."""
    cfgs: list[Any] = [timm.get_pretrained_cfg(model_id) for model_id in config.timm_model_ids or []]
    return OpenVLAImageProcessor(
        use_fused_vision_backbone=bool(config.use_fused_vision_backbone),
        image_resize_strategy=config.image_resize_strategy,
        input_sizes=[[3, size, size] for size in config.image_sizes or []],
        interpolations=[cfg.interpolation or "bicubic" for cfg in cfgs],
        means=[list(cfg.mean) for cfg in cfgs],
        stds=[list(cfg.std) for cfg in cfgs],
    )


def check_of_original(config: OpenVLAConfig, where: str | os.PathLike) -> None:
    """Raise a `ValueError` for a model that a run of the original cannot stand for: there it would act otherwise."""
    known = {"action_head": "tokens", "action_chunk": 1, "proprio_dim": None, "use_film": False, "n_action_bins": 256}
    others = [f"{name}={getattr(config, name)!r}" for name, value in known.items() if getattr(config, name) != value]
    if len(config.camera_names) > 1:
        others.append(f"camera_names={config.camera_names}")
    # It reads q01 and q99 of the statistics, whatever the model learned.
    others += [f"normalization of '{name}'={mode!r}" for name, mode in config.normalization.items() if mode == "bounds"]
    if others:
        raise ValueError(
            f"'{where}' has {', '.join(others)}, which the original's training code does not know: one image, one step "
            "of 256 bins between q01 and q99, its tokens one after another. Load it with this package."
        )


# And back -------------------------------------------------------------------------------------------------------------


def shown_by(source: Path, config: OpenVLAConfig) -> dict[str, Any]:
    """What a run says of the images that its model was trained to see, by the processor in `source`; empty without one.

    Raises:
        ValueError: If it has prompts of its own: the original would ask in others.
    """
    if not any((source / name).is_file() for name in ("processor_config.json", "preprocessor_config.json")):
        return {}
    processor = OpenVLAProcessor.from_pretrained(source)
    if processor.prompt_template != prompt_template_of(config.to_dict()):
        raise ValueError(
            f"'{source}' has prompt_template={processor.prompt_template!r}, and the original's training code asks a "
            f"{config.llm_backbone_id} with {prompt_template_of(config.to_dict())!r}. Load it with this package."
        )
    images = processor.image_processor
    pixels = {name: getattr(images, name) for name in ("resize_filter", "center_crop", "jpeg_quality")}
    return {"image_aug": images.center_crop is not None, SHOWN: pixels}


def export_prismatic_checkpoint(
    weights: str | os.PathLike, output: str | os.PathLike, *, dtype: str | None = None, overwrite: bool = False
) -> Path:
    """Write a Hub folder as a training run of the original: `checkpoints/latest-checkpoint.pt`, ids and statistics.

    The complete model is in memory once.

    Args:
        weights: Folder or Hub id, published layout or ours.
        output: Run folder to write.
        dtype: "float32", which the original's trainer expects, "bfloat16" or "float16". Default: unchanged.
        overwrite: Replace the files of an existing run.

    Returns:
        The run folder.

    Raises:
        ValueError: If the model is one that the original does not know, an adapter or quantized, its weights are not
            finite, or `output` is not empty.
    """
    if dtype is not None:
        check_choice("dtype", dtype, DTYPES)
    source, output = model_folder(weights), Path(output)
    check_replaced(output, source, "vla", "a run of the original")
    config = OpenVLAConfig.from_pretrained(source)
    check_unquantized(config, weights)
    check_of_original(config, weights)
    tensors, table = read_weights(source), name_table(config)
    check_weights(config, {name: tensor.shape for name, tensor in tensors.items()}, f"'{source}'")
    ids = {
        field: getattr(config, field) for field in ("vision_backbone_id", "llm_backbone_id", "image_resize_strategy")
    }
    known = ids["vision_backbone_id"] in VISION_BACKBONES and ids["llm_backbone_id"] in LLM_BACKBONES
    usual = expected_shapes(config_of_ids(ids, source)) if known else {}
    sizes: dict[str, Any] = {}
    if any(tensor.shape != usual.get(name) for name, tensor in tensors.items()):
        sizes = {SIZES: {name: value for name, value in config.to_diff_dict().items() if name not in OF_FOLDER}}
        warnings.warn(
            f"'{weights}' has other sizes than {ids['vision_backbone_id']} and {ids['llm_backbone_id']} stand for: the "
            "original's training code cannot load it. `openvla convert RUN OUT --tokenizer MODEL` takes it back.",
            stacklevel=2,
        )
    same = sorted((name for name, known in load_base_vlms().items() if known == ids), key=len)
    statistics, shown = statistics_of(source, config), shown_by(source, config)

    parts: dict[str, OrderedDict[str, torch.Tensor]] = {part: OrderedDict() for part in PARTS}
    for name, tensor in tensors.items():
        part, _, theirs = rename(name, table, back=True).partition(".")
        parts[part][theirs] = read_as(name, tensor, None if dtype is None else DTYPES[dtype])
    with new_folder(output, overwrite) as folder:
        (folder / LATEST).parent.mkdir()
        try:
            torch.save({"model": parts}, folder / LATEST)
        except RuntimeError as error:  # torch's own writer, on a full disk
            raise OSError(f"Cannot write '{folder / LATEST}': {str(error).splitlines()[0]}") from error
        model = {"model_id": same[0] if same else "openvla", "arch_specifier": config.arch_specifier, **ids}
        write_json(folder / "config.json", {"model": model, "vla": {"base_vlm": model["model_id"]}, **shown, **sizes})
        write_json(folder / "dataset_statistics.json", statistics)
    return output
