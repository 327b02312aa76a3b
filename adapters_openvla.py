"""Folders of adapters (PEFT): what belongs to one beside its weights, and the base it was trained on.

An adapter speaks the units of its own training, from its own prompts and pixels. PEFT hands a model nothing of an
adapter's folder but what stands in adapter_config.json; there, under the free `auto_mapping`, a run keeps it:

    {"openvla": {"norm_stats": {...}, "processor": {"image_processor": {...}, "prompt_template": "..."},
                 "model": {"action_chunk": 1, "camera_names": ["primary"]}, "base_digest": "...",
                 "file_digests": {"adapter_model.safetensors": "..."}}}
"""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors import safe_open
from transformers.utils import cached_file

from .action_tokenizer import check_statistics, read_statistics
from .files_openvla import QUIET, cache_folder, check_file, file_digest, local_folder, read_json, weights_digest
from .image_processing_openvla import OpenVLAImageProcessor
from .processing_openvla import OpenVLAProcessor
from .processor_files_openvla import STARTED, hub_options, pixels_of_older_run
from .weights_openvla import WEIGHTS_FILES


KEY = "openvla"
ADAPTER, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Fields of the configuration that training may change
OF_MODEL = ("action_chunk", "camera_names", "normalization", "constant_state", "prefix_training")
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
    hub = hub_options(hub)

    def file(name: str) -> str | None:
        return cached_file(os.fspath(adapter), name, **QUIET, **hub)

    config = file(ADAPTER)
    if config is None:
        raise FileNotFoundError(f"'{adapter}' holds no adapter ({ADAPTER}): is it the output of a lora run?")
    found = belongings(read_json(config))
    if changed := changed_files(Path(config).parent, found.pop("file_digests", {})):
        warnings.warn(
            f"'{changed[0]}' is not the file that was saved with its {ADAPTER}, of which units "
            f"({', '.join(found.get('norm_stats', {}))}), prompts and pixels are. If it is of another run or step, "
            "take the complete folder of that one: its actions are wrong here.",
            stacklevel=3,
        )
    statistics = file("dataset_statistics.json")
    if said := {} if statistics is None else read_statistics(statistics):
        if found.get("norm_stats") and found["norm_stats"] != said:
            warnings.warn(
                f"'{statistics}' holds other statistics ({', '.join(said)}) than the adapter was trained with by its "
                f"{ADAPTER} ({', '.join(found['norm_stats'])}): the file counts, and other units than those of the "
                "training make wrong actions. If it is of another run, put back that of this one, or remove it.",
                stacklevel=3,
            )
        found["norm_stats"] = said
    elif found.get("norm_stats"):
        check_statistics(found["norm_stats"], f"'{config}'")
    else:  # an empty one says nothing, and would count as units that are known
        found.pop("norm_stats", None)
    processor, pixels = file("processor_config.json"), file("preprocessor_config.json")
    content = {} if processor is None else read_json(processor)
    if "image_processor" not in content and pixels is not None:  # the published layout keeps it there
        content["image_processor"] = read_json(pixels)
    if shown := {name: value for name, value in of_processor(content).items() if value}:
        found["processor"] = {**found.get("processor", {}), **shown}
    if images := found.get("processor", {}).get("image_processor"):
        file(STARTED)  # of a Hub id it is brought beside the others
        images |= pixels_of_older_run(Path(config).parent, images)
    return found


def changed_files(folder: Path, digests: Mapping[str, str]) -> list[Path]:
    """Files in `folder` that are not those that were saved: of another run they fit as well."""
    there = {folder / name: digest for name, digest in digests.items() if (folder / name).is_file()}
    return [file for file, digest in there.items() if file_digest(file) != digest]


def adapter_names(adapter: str | os.PathLike, hub: Mapping[str, Any]) -> list[str] | None:
    """Names of the tensors of an adapter, a folder or Hub id; None where it is not stored as safetensors."""
    hub = hub_options(hub)
    file = cached_file(os.fspath(adapter), WEIGHTS, **QUIET, **hub)
    if file is None:
        return None
    with safe_open(check_file(file, "weights file of the adapter"), framework="pt") as stored:
        return list(stored.keys())


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
    options = hub_options(hub) | QUIET
    config = cached_file(os.fspath(model), ADAPTER, **options)
    if config is None:
        return None
    read_json(config, marked=False)  # says what is wrong with it
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
        ValueError: If it is a Hub id, of which the adapter names another revision than "main".
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
    if digest and os.path.isfile(note := cache_folder() / "bases" / digest):  # False as well where it may not be read
        candidates.append(Path(note.read_text(encoding="utf-8")))
    for candidate in candidates:
        if (candidate / "config.json").is_file():
            return str(candidate.resolve())
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):  # a Hub id
        if (revision := config.get("revision")) not in (None, "", "main"):  # PEFT's field, of the base
            raise ValueError(
                f"The adapter in '{folder}' was trained on revision '{revision}' of '{name}', and a base is taken as "
                f"it is now: load, OpenVLAForActionPrediction.from_pretrained('{name}', revision='{revision}'), "
                "then model.load_adapter(RUN); or download that revision and say `openvla merge RUN OUT --base FOLDER`."
            )
        return name
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


def check_name(base: str, named: str | None) -> str | None:
    """What cannot be told of `base` if an adapter names another one, and no digest; a folder is known by its last part,
    as it may have been moved."""
    try:
        own = portable_model(base, base)
    except FileNotFoundError:  # removed since it was loaded
        own = base
    in_cache = f"models--{named}".replace("/", "--") in Path(base).parts
    if not named or in_cache or Path(own).name == Path(named).name or Path(base).name == Path(named).name:
        return None
    return (
        f"The adapter names '{named}' as its base, and the model came from '{base}': nothing tells whether their "
        "weights are the same, and if they are not, its actions may be wrong"
    )


__all__ = ["belongings", "check_base", "check_name", "find_adapter", "find_base", "name_base", "read_belongings"]
