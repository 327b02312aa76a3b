"""What every written Hub folder has in common: it appears complete or not at all, carries its own code, configuration,
processor, statistics and model card, and its weights are those the configuration calls for.
"""

import ast
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import GenerationConfig
from transformers.core_model_loading import revert_weight_conversion

from ..adapters_openvla import find_adapter
from ..configuration_openvla import OpenVLAConfig
from ..files_openvla import read_json
from ..folders import MARKS, STALE, new_folder, save_processor, write_json
from ..hub import model_folder, statistics_of
from ..model_card import model_card
from ..modeling_openvla import OpenVLAForActionPrediction
from ..oft_openvla import find_oft
from ..processing_openvla import OpenVLAProcessor
from ..quantized_linear_openvla import all_finite
from ..weights_openvla import check_tensors, check_weight_file, find_weight_files
from .own_head import carry_head


_MODEL = "modeling_openvla.OpenVLAForActionPrediction"
CONFIG_AUTO_MAP = {
    "AutoConfig": "configuration_openvla.OpenVLAConfig",
    "AutoModel": _MODEL,
    "AutoModelForImageTextToText": _MODEL,
    "AutoModelForVision2Seq": _MODEL,  # transformers 4 and scripts written for the original
    "AutoProcessor": "processing_openvla.OpenVLAProcessor",
    "AutoImageProcessor": "image_processing_openvla.OpenVLAImageProcessor",
}
PACKAGE = Path(__file__).resolve().parents[1]
PROCESSOR_AUTO_MAP = {name: CONFIG_AUTO_MAP[name] for name in ("AutoProcessor", "AutoImageProcessor")}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
WEIGHTS_FILE, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"


@cache
def code_files() -> tuple[str, ...]:
    """The flat files that a folder carries: those that `CONFIG_AUTO_MAP` names, and whatever they import of ours."""
    found: set[str] = set()
    waiting = {reference.split(".")[0] for reference in CONFIG_AUTO_MAP.values()}
    while waiting:
        module = waiting.pop()
        found.add(module)
        tree = ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8")))
        waiting |= {str(node.module) for node in tree if isinstance(node, ast.ImportFrom) and node.level} - found
    return tuple(sorted(f"{module}.py" for module in found))


class LazyTensor(NamedTuple):
    """A tensor of a checkpoint, read when it is needed.

    Args:
        dtype: In which it is written. None: as all others are.
    """

    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]
    dtype: torch.dtype | None = None

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "LazyTensor":
        """A tensor that is there already, or mapped from disk."""
        return cls(tuple(tensor.shape), lambda: tensor)


def check_replaced(output: Path, source: Path, key: str | None, kind: str) -> None:
    """Before files of `output` are replaced (`overwrite`): whether they are of the same kind, and not what is read. All
    of `MARKS` go, and older weights: those of an adapter are what somebody has trained.

    Args:
        source: Folder that is read from.
        key: Of a config.json of that kind; None: it has none, but a runtime.json.

    Raises:
        ValueError: If `output` is `source`, or holds a file of something else that would be lost.
    """
    output = output.expanduser().resolve()
    if output == source.expanduser().resolve():
        raise ValueError(f"'{output}' is what is read: its files would be replaced. Give another folder.")
    if not output.is_dir():
        return
    own = ("runtime.json",) if key is None else ("config.json", "dataset_statistics.json")
    others = [output / name for name in MARKS if name not in own and (output / name).is_file()]
    if key is None:
        others += [file for file in output.iterdir() if STALE.fullmatch(file.name)]
    elif (config := output / "config.json").is_file() and key not in read_json(config):
        others = [config, *others]
    if others:
        raise ValueError(f"'{others[0]}' is not of {kind}, and would be replaced: give another folder.")


def open_model_folder(
    model: str | os.PathLike, revision: str | None, then: str
) -> tuple[Path, OpenVLAConfig, OpenVLAProcessor, dict[str, Any]]:
    """Local folder, configuration, processor and statistics of a model in one folder.

    Args:
        then: What can be done with a checkpoint of OpenVLA-OFT once it is one folder, for the error.

    Raises:
        FileNotFoundError: If configuration or tokenizer are missing.
        ValueError: If the model is spread over the files of OpenVLA-OFT.
    """
    source = model_folder(model, revision)
    if find_oft(source) is not None:
        raise ValueError(
            f"'{model}' is a checkpoint of OpenVLA-OFT: `openvla convert FOLDER OUT` makes one model of its parts, "
            f"{then}."
        )
    config = OpenVLAConfig.from_pretrained(source)
    statistics = statistics_of(source, config)
    return source, config, OpenVLAProcessor.from_pretrained(source), statistics


@contextmanager
def new_model_folder(
    output: str | os.PathLike,
    source: Path,
    given: str | os.PathLike,
    config: OpenVLAConfig,
    processor: OpenVLAProcessor,
    statistics: dict[str, Any],
    *,
    name: str | None,
    overwrite: bool,
) -> Iterator[Path]:
    """A folder for weights that come from another; all that goes with them is written when they are there.

    Args:
        source: The folder they come from.
        given: How the caller named it: a folder or a Hub id, for the model card.
        name: What the model card calls the model. Default: the name of `output`.
    """
    output = Path(output)
    check_replaced(output, source, "model_type", "a model")
    with new_folder(output, overwrite) as folder:
        yield folder
        write_companions(
            folder,
            config,
            processor,
            statistics,
            name=name or output.resolve().name,
            source=None if Path(given).is_dir() else str(given),
            model_folder=source,
        )


def check_unquantized(config: OpenVLAConfig, where: Any) -> None:
    """Raise a `ValueError` if config.json says that weights are quantized: no longer those of the training."""
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"'{where}' is quantized: give the model that it was made of.")


# Weights --------------------------------------------------------------------------------------------------------------


def weight_files(folder: Path) -> list[Path]:
    """Safetensors files of a Hub folder in order.

    Raises:
        FileNotFoundError: If there are none (says what the folder holds instead), or a shard of the index is missing.
        ValueError: If the folder holds an adapter beside them, as loading it does.
    """
    files = find_weight_files(folder, [WEIGHTS_FILE])
    if files:
        find_adapter(folder)
        return files
    if (folder / "adapter_config.json").is_file():
        raise FileNotFoundError(
            f"'{folder}' holds a LoRA adapter, not a model: merge it first (`openvla merge RUN OUT`) and give the "
            "merged folder."
        )
    if any(folder.glob("pytorch_model*.bin")):
        raise FileNotFoundError(
            f"'{folder}' holds pytorch_model*.bin: save it as safetensors first, "
            "OpenVLAForActionPrediction.from_pretrained(folder).save_pretrained(new_folder)."
        )
    raise FileNotFoundError(f"'{folder}' holds no {WEIGHTS_FILE} and no {WEIGHTS_INDEX}: is it a model folder?")


def read_weights(folder: Path) -> dict[str, LazyTensor]:
    """Every tensor of a Hub folder, not yet read; a `ValueError` names a file that is damaged or a Git LFS pointer."""
    tensors = {}
    for file in weight_files(folder):
        check_weight_file(file)
        handle = safe_open(file, framework="pt")
        for name in handle.keys():  # noqa: SIM118 - not a dict
            shape = tuple(handle.get_slice(name).get_shape())
            tensors[name] = LazyTensor(shape, partial(handle.get_tensor, name))
    return tensors


def expected_shapes(config: OpenVLAConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor a configuration calls for; nothing is allocated."""
    return {name: tuple(tensor.shape) for name, tensor in _without_values(config).state_dict().items()}


def _without_values(config: OpenVLAConfig) -> OpenVLAForActionPrediction:
    with torch.device("meta"):
        return OpenVLAForActionPrediction(config)


def as_stored(
    model: OpenVLAForActionPrediction, names: Collection[str]
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors of a model without values as weight files of these names hold them: transformers 5 stores those of some
    language models under other names than their modules have (GPT-NeoX), and experts one by one.

    Returns:
        The tensors by stored name, and names in the model by those of the tensors that are stored as they are.
    """
    own = dict(model.state_dict())
    stored = revert_weight_conversion(model, dict(own))
    if not any(name in stored and name not in own for name in names):  # older files may have the names of modules
        stored = own
    names_of = {id(tensor): name for name, tensor in own.items()}
    return stored, {name: names_of[id(tensor)] for name, tensor in stored.items() if id(tensor) in names_of}


def check_weights(config: OpenVLAConfig, shapes: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Raise a `ValueError` that lists tensors missing from `shapes`, unexpected in it, or of another shape."""
    model = _without_values(config)
    tensors, modules = as_stored(model, shapes)
    expected = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    tied = set()
    if config.text_config.tie_word_embeddings:  # then files lack the output layer, whatever it is called
        output = model.get_output_embeddings()
        tied = {f"{name}.weight" for name, module in model.named_modules() if module is output}
    check_tensors(
        what,
        missing=[name for name in expected if name not in shapes and modules.get(name) not in tied],
        unexpected=[name for name in shapes if name not in expected],
        mismatched={
            name: (shapes[name], shape)
            for name, shape in expected.items()
            if name in shapes and tuple(shapes[name]) != shape
        },
    )


def read_as(name: str, tensor: LazyTensor, dtype: torch.dtype | None) -> torch.Tensor:
    """A copy in a type (None: its own); a `ValueError` if it is not finite, or becomes so in that type."""
    stored = tensor.read()
    value = stored.to(dtype or stored.dtype, copy=True).contiguous()
    if value.is_floating_point() and value.element_size() > 1 and not all_finite(value):
        why = "holds NaN or infinite values: it was damaged, or its training diverged"
        if all_finite(stored):
            why = f"has numbers that {str(dtype).removeprefix('torch.')} cannot hold: take bfloat16"
        raise ValueError(f"{name} {why}.")
    return value


def write_weights(
    folder: Path, tensors: Mapping[str, LazyTensor], dtype: torch.dtype | None, max_shard_size: int | str
) -> None:
    """Write `tensors` as safetensors in `dtype` (None: each as it is); no more than one shard is in memory.

    Raises:
        ValueError: If one is not finite, or becomes so in its type, or `max_shard_size` is no size.
        OSError: If a file cannot be written.
    """
    sizes = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype or dtype or tensor.read().dtype, device="meta")
        for name, tensor in tensors.items()
    }
    try:
        split = split_torch_state_dict_into_shards(sizes, max_shard_size=max_shard_size)
    except ValueError as error:
        raise ValueError(f"max_shard_size={max_shard_size!r}: expected a size such as '5GB' ({error}).") from error
    for file, names in split.filename_to_tensors.items():
        shard = {name: read_as(name, tensors[name], sizes[name].dtype) for name in names}
        try:
            save_file(shard, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk, mostly
            raise OSError(f"Cannot write '{folder / file}': {error}") from error
        del shard  # before the next one is read
    if split.is_sharded:
        write_json(folder / WEIGHTS_INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})


# Everything beside the weights ----------------------------------------------------------------------------------------


def write_companions(
    folder: Path,
    config: OpenVLAConfig,
    processor: OpenVLAProcessor,
    statistics: dict[str, Any],
    *,
    name: str,
    source: str | None = None,
    model_folder: Path | None = None,
) -> None:
    """Code, config.json, processor, tokenizer, statistics, generation config and model card of a folder.

    Args:
        name: What the model card calls the model.
        source: Hub id the weights come from, for the model card.
        model_folder: Folder the weights come from; its generation config and the licence of its card are taken over.
    """
    for file in code_files():
        shutil.copyfile(PACKAGE / file, folder / file)
    carry_head(folder, config.action_head)

    config.norm_stats = statistics
    config.auto_map = dict(CONFIG_AUTO_MAP)
    config.architectures = ["OpenVLAForActionPrediction"]
    if config.empty_token_id is None:
        config.empty_token_id = processor.empty_token_id
    config.save_pretrained(folder)
    write_json(folder / "dataset_statistics.json", statistics)

    if model_folder is not None and (model_folder / "generation_config.json").is_file():
        shutil.copyfile(model_folder / "generation_config.json", folder / "generation_config.json")
    else:
        ids = {key: getattr(config.text_config, key) for key in ("bos_token_id", "eos_token_id")}
        GenerationConfig(**ids, pad_token_id=config.pad_token_id).save_pretrained(folder)

    save_processor(processor, folder)
    written = read_json(folder / "processor_config.json")
    written["auto_map"] = dict(PROCESSOR_AUTO_MAP)
    written["image_processor"]["auto_map"] = {"AutoImageProcessor": PROCESSOR_AUTO_MAP["AutoImageProcessor"]}
    write_json(folder / "processor_config.json", written)

    tokenizer = read_json(folder / "tokenizer_config.json")
    for key in ("auto_map", "is_local", "local_files_only"):  # of the folder it was read from
        tokenizer.pop(key, None)
    # The name every version of transformers knows: tokenizer.json is taken as it is and gives the ids of the training.
    tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(folder / "tokenizer_config.json", tokenizer)

    (folder / "README.md").write_text(
        model_card(name, config, statistics, source=source, model_folder=model_folder, carries_code=True),
        encoding="utf-8",
    )
