"""Folders as OpenVLA-OFT saves them (moojink/openvla-oft): which files there are, what they say of the configuration,
and their tensors under the names of this package.

Beside the weights of an OpenVLA model, or an adapter that was not merged (`lora_adapter`), such a folder holds one file
for each further part, `PART--STEP_checkpoint.pt`; nothing in its config.json tells of them.
"""

import copy
import os
import pickle
import re
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from huggingface_hub import list_repo_files, snapshot_download
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError, safe_open

from .choices_openvla import check_choice, closest
from .files_openvla import QUIET, check_file, local_folder, read_json


COMPONENTS = ("action_head", "noisy_action_projector", "proprio_projector", "vision_backbone")
PART_FILE = "{}*.pt"  # the files of these; "action_head--150000_checkpoint.pt" as saved, and whatever was made of it
WEIGHTS = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
STEP = re.compile(r"--(\d+)_")
ADAPTER = "lora_adapter"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = f"{ADAPTER}/adapter_config.json", f"{ADAPTER}/adapter_model.safetensors"
FILM_WRAPPED = "vision_backbone.vision_backbone."  # how an adapter names towers with FiLM
HEAD_PREFIXES = {"model.": "l1_regression", "noise_predictor.mlp_resnet.": "diffusion"}  # by the names of their tensors
# What no file says: by the numbers of an action (LIBERO 7, ALOHA 14) and of the state (None: no state is seen)
CHUNKS = {7: 8, 14: 25}
BRIDGE = (7, 7)  # an action and a state of seven numbers: 5 steps
BOUNDS = (14,)  # normalized by min and max, others by q01 and q99
CAMERAS = {
    None: ["full_image"],
    8: ["full_image", "wrist_image"],
    14: ["full_image", "left_wrist_image", "right_wrist_image"],
}
HUB = ("cache_dir", "force_download", "local_files_only", "token", "revision")  # how a Hub repository is read
HUB_KWARGS = (*HUB, "subfolder")  # and where in it: of `from_pretrained`


# Recognising ----------------------------------------------------------------------------------------------------------


def oft_folder(name: str | os.PathLike, subfolder: str | None = None, **hub: Any) -> Path | None:
    """The folder that may be one of OpenVLA-OFT: a local one, or of a Hub id the downloaded files beside the weights.
    None for other Hub ids.

    Raises:
        FileNotFoundError: If `name` is neither a folder nor can be a Hub id.
    """
    from transformers.utils import cached_file  # not before configuration_openvla has looked at the version

    folder = local_folder(name)
    if folder is not None:
        return folder / (subfolder or "")
    hub = {key: value for key, value in hub.items() if key in HUB}
    within = f"{subfolder}/" if subfolder else ""
    if cached_file(os.fspath(name), within + ADAPTER_CONFIG, **QUIET, **hub) is None:
        config = cached_file(os.fspath(name), f"{within}config.json", **QUIET, **hub)
        if config is None or not _has_parts(Path(config), os.fspath(name), within, hub):
            return None
    wanted = [f"{within}{pattern}" for pattern in ("*.json", *map(PART_FILE.format, COMPONENTS))]
    return Path(snapshot_download(os.fspath(name), allow_patterns=wanted, **hub)) / within


def _has_parts(config: Path, name: str, within: str, hub: Mapping[str, Any]) -> bool:
    """Whether a Hub repository without an adapter holds parts beside its config.json, whose names nothing tells."""
    if "action_head" in read_json(config):  # ours
        return False
    files = [file.name for file in config.parent.iterdir()]
    if not hub.get("local_files_only"):
        with suppress(OSError, HTTPError):  # without a network what is there has to do
            files += _repository_files(name, hub.get("revision"), hub.get("token"))
    return any(
        fnmatch(file, place + PART_FILE.format(part)) for file in files for part in COMPONENTS for place in {"", within}
    )


@lru_cache(maxsize=32)  # asked for several times by each loading
def _repository_files(name: str, revision: str | None, token: str | bool | None) -> list[str]:
    return list_repo_files(name, revision=revision, token=token)


def with_weights(name: str | os.PathLike, folder: Path, **hub: Any) -> Path:
    """`folder` of `oft_folder` with the weights in it, which of a Hub id are downloaded only now."""
    if local_folder(name) is None:
        hub = {key: value for key, value in hub.items() if key in HUB}
        wanted = ["*model*.safetensors", "*.index.json"]
        ignored = [] if needs_base(folder) else [f"*{ADAPTER}/*"]  # merged already
        snapshot_download(os.fspath(name), allow_patterns=wanted, ignore_patterns=ignored, **hub)
    return folder


def needs_base(folder: Path) -> bool:
    """Whether a folder holds an adapter that was not merged."""
    return not (folder / "config.json").is_file() and (folder / ADAPTER_CONFIG).is_file()


def find_oft(folder: Path | None, action_head: str | None = None) -> "OFTFolder | None":
    """What `folder` holds of OpenVLA-OFT; None if it is of another kind.

    Args:
        action_head: What the caller says the head is. Only so a folder of the discrete variant is known: it holds
            nothing that tells it from an ordinary OpenVLA model.

    Raises:
        ValueError: If there are several files for one part, parts of several steps, parts and no head or under other
            names while `action_head` is None, or `action_head` is not that of a folder of this package.
    """
    config = None if folder is None else folder / "config.json"
    if folder is None or config is None or (config.is_file() and "action_head" in read_json(config)):  # ours
        return None
    files = {}
    for part in COMPONENTS:
        found = sorted(folder.glob(PART_FILE.format(part)))
        if len(found) > 1:
            raise ValueError(
                f"'{folder}' holds {len(found)} files for {part} ({', '.join(file.name for file in found)}), and "
                "nothing says which belongs to the weights: leave one."
            )
        if found:
            files[part] = found[0]
    steps = {step[1] for file in files.values() if (step := STEP.search(file.name))}
    if len(steps) > 1:
        names = ", ".join(file.name for file in files.values())
        raise ValueError(
            f"'{folder}' holds parts of several steps of a training ({names}): take all of the step that the weights "
            "are of."
        )
    if "action_head" in files:
        return OFTFolder(folder, files)
    if action_head == "parallel_tokens" and (config.is_file() or (folder / ADAPTER_CONFIG).is_file()):
        if not files and config.is_file() and "empty_token_id" in read_json(config):
            raise ValueError(
                f"action_head='parallel_tokens': '{folder}' was saved by this package, which writes down every head "
                "but the usual one: its actions are tokens, one after another. If OpenVLA-OFT trained it on, take "
                "empty_token_id out of its config.json."
            )
        return OFTFolder(folder, files)
    parts = [file.name for file in files.values()] + [ADAPTER_CONFIG] * (folder / ADAPTER_CONFIG).is_file()
    if parts and action_head is None:
        raise ValueError(
            f"'{folder}' is a checkpoint of OpenVLA-OFT ({', '.join(parts)}) without an action_head--*.pt. If it has "
            "one elsewhere (Hub, training run), copy it here. If it was trained on discrete actions, which need none, "
            "say so: from_pretrained(folder, action_head='parallel_tokens')."
        )
    if config.is_file() and action_head is None and (odd := _misplaced(folder)):
        raise ValueError(
            f"'{odd}' is a part of OpenVLA-OFT by its name, and parts are read as PART--STEP_checkpoint.pt beside "
            f"config.json ({', '.join(COMPONENTS)}; written by torch.save): name and place it so. If it is none, "
            "take it out of this folder."
        )
    return None


def _misplaced(folder: Path) -> Path | None:
    """A weights file in a folder, or one below it, that has the name of a part and is not where it is read."""
    files = (file for pattern in ("*", "[!.]*/*") for file in folder.glob(pattern) if file.suffix in WEIGHTS)
    named = ((file, re.sub(r"[^a-z]", "", file.name.lower())) for file in sorted(files))
    return next((file for file, name in named if any(part.replace("_", "") in name for part in COMPONENTS)), None)


@dataclass(frozen=True)
class OFTFolder:
    """A checkpoint of OpenVLA-OFT.

    Args:
        files: The file of each of `COMPONENTS` that is there.
    """

    folder: Path
    files: dict[str, Path]

    # Configuration ----------------------------------------------------------------------------------------------------

    def fields(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of the configuration that the parts, and the platforms of the original, stand for.

        Args:
            given: Arguments of `from_pretrained`: `action_chunk`, `camera_names`, `normalization` and `norm_stats` win
                over what platforms and files say; `normalization` may also be one name for all datasets.

        Raises:
            ValueError: If parts are damaged or unknown, contradict `given`, or stand for no platform.
        """
        head, action_dim = self._head()
        if (asked := given.get("action_head")) not in (None, head):
            raise ValueError(
                f"action_head={asked!r}: '{self.files['action_head']}' is one of '{head}', and the weights beside it "
                "were trained with it."
            )
        statistics = self._statistics(given.get("norm_stats"))
        if action_dim is None:
            sizes = {len(content["action"]["q01"]) for content in statistics.values()}
            action_dim = sizes.pop() if len(sizes) == 1 else None
        state = None
        if "proprio_projector" in self.files:
            state = self._part("proprio_projector")["proprio_projector.fc1.weight"].shape[1]
        self._check_towers()
        platform = 5 if (action_dim, state) == BRIDGE else CHUNKS.get(action_dim or 0)
        chunk = given.get("action_chunk") or platform
        if chunk is None:
            raise ValueError(
                f"'{self.folder}': nothing says how many steps one prediction is for, and actions of {action_dim} "
                "numbers are those of no platform of OpenVLA-OFT (7: 8 steps, 14: 25): give action_chunk."
            )
        cameras = given.get("camera_names") or CAMERAS.get(state)
        if cameras is None:
            raise ValueError(
                f"'{self.folder}': nothing says which cameras the model sees, and a state of {state} numbers is that "
                "of no platform of OpenVLA-OFT (8: two cameras, 14: three): give camera_names, for example "
                "['full_image', 'wrist_image'], in the order of its training."
            )
        if state is None and given.get("camera_names") is None:
            warnings.warn(
                f"'{self.folder}': nothing says which cameras the model sees; without a proprio_projector--*.pt it is "
                f"taken for one of a single camera, {cameras[0]}. One that was trained on several acts wrongly so: "
                "give camera_names, ['full_image', 'wrist_image'] for example, or copy the missing part here.",
                stacklevel=4,
            )
        units = given.get("normalization") or ("bounds" if action_dim in BOUNDS else {})
        return {
            "action_head": head,
            "action_chunk": chunk,
            "action_dim": action_dim if "action_head" in self.files else None,
            "camera_names": cameras if isinstance(cameras, str) else list(cameras),  # one text is refused
            "proprio_dim": state,
            "constant_state": "clip",
            "use_film": "vision_backbone" in self.files,
            "normalization": dict.fromkeys(statistics, units) if isinstance(units, str) else dict(units),
            "norm_stats": statistics or None,  # in config.json are those of the base
        }

    def complete(self, config: Any) -> Any:
        """A copy of the configuration, with the fields of the parts where it has only what stands in config.json, as
        `AutoConfig` reads it."""
        config = copy.deepcopy(config)
        if config.constant_state == "clip":
            return config
        default = type(config)()
        names = ("action_head", "action_chunk", "camera_names", "normalization")
        given = {name: getattr(config, name) for name in names if getattr(config, name) != getattr(default, name)}
        for name, value in self.fields(given).items():
            setattr(config, name, value)
        config.check_fields()
        return config

    def _head(self) -> tuple[str, int | None]:
        """Name of the head, and the numbers of an action where it has weights."""
        if "action_head" not in self.files:
            return "parallel_tokens", None
        tensors, file = read_checkpoint(self.files["action_head"]), self.files["action_head"]
        for prefix, head in HEAD_PREFIXES.items():
            last = tensors.get(f"{prefix}fc2.weight")
            if last is not None and last.ndim == 2:
                return head, len(last)
        raise ValueError(
            f"'{file}' holds no head of OpenVLA-OFT (tensors {', '.join(list(tensors)[:3])}, ...): expected names that "
            f"begin with {' or '.join(HEAD_PREFIXES)}."
        )

    def _check_towers(self) -> None:
        """Raise a `FileNotFoundError` if the adapter, merged or not, was trained with FiLM and the towers are missing:
        those among the weights are of the base, without it."""
        file = self.folder / ADAPTER_WEIGHTS
        if "vision_backbone" in self.files or not file.is_file():
            return
        names: list[str] = []
        with suppress(SafetensorError, OSError), safe_open(file, framework="pt") as tensors:  # merged: not needed else
            names = list(tensors.keys())
        if wrapped := next((name for name in names if FILM_WRAPPED in name), None):
            raise FileNotFoundError(
                f"'{self.folder}' was trained with FiLM ('{file}' has {wrapped}), and its vision_backbone--*.pt, which "
                "holds the towers, is missing: copy it here."
            )

    def _statistics(self, given: Mapping[str, Any] | None) -> dict[str, Any]:
        file = self.folder / "dataset_statistics.json"
        found = given or (read_json(file) if file.is_file() else {})
        known = found.items() if isinstance(found, Mapping) else ()  # what is wrong is said where they are read again
        return {
            name: entry
            for name, entry in known
            if isinstance(entry, Mapping) and isinstance(entry.get("action"), Mapping) and "q01" in entry["action"]
        }

    def statistics(self) -> list[dict[str, Any]]:
        """Those in the files of the folder: dataset_statistics.json, and config.json, where they are of the base."""
        config = self.folder / "config.json"
        of_base = read_json(config).get("norm_stats") if config.is_file() else None
        return [self._statistics(None), of_base or {}]

    def check_statistics(self, statistics: Mapping[str, Any] | None, fields: Any) -> None:
        """Raise an error if statistics are not there, or of other actions or states than the model has.

        Args:
            fields: The configuration of the model.
        """
        if not statistics:
            raise FileNotFoundError(
                f"'{self.folder}' has no dataset_statistics.json, so its actions would have no units: copy that of its "
                "training, or give norm_stats."
            )
        for dataset in fields.normalization.keys() - statistics.keys():
            raise ValueError(
                f"normalization names '{dataset}', of which there are no statistics.{closest(dataset, statistics)} "
                f"Known: {', '.join(sorted(statistics))}."
            )
        for dataset, content in statistics.items():
            for kind, expected in (("action", fields.action_dim), ("proprio", fields.proprio_dim)):
                found = len((content.get(kind) or {}).get("q01", ()))
                if expected is not None and found != expected:
                    raise ValueError(
                        f"Statistics of '{dataset}' are of {found} numbers ({kind}), the weights in '{self.folder}' of "
                        f"{expected}: take the dataset_statistics.json of their training."
                    )

    # Base -------------------------------------------------------------------------------------------------------------

    def find_base(self, base: str | os.PathLike | None = None) -> str | os.PathLike | None:
        """What config.json and the weights under an adapter come from; None where the folder holds them itself.

        Raises:
            ValueError: If `base` is given and the adapter is merged already, or it is needed and not known.
        """
        if not needs_base(self.folder):
            if base is not None:
                raise ValueError(
                    f"base='{os.fspath(base)}': the weights in '{self.folder}' are merged already, and adding the "
                    f"adapter a second time would spoil them: leave base out. (A folder with {ADAPTER_CONFIG} and no "
                    "config.json is one that was not merged.)"
                )
            return None
        if base is not None:
            return base
        named = str(read_json(self.folder / ADAPTER_CONFIG).get("base_model_name_or_path") or "")
        if named and (Path(named) / "config.json").is_file():
            return named
        cached = re.search(r"models--([^/]+?)--([^/]+)/snapshots/", named)
        hint = f" It was trained on '{cached[1]}/{cached[2]}'." if cached else f" It names '{named}'." if named else ""
        raise ValueError(
            f"'{self.folder}' holds an adapter and no weights of a model: give what it was trained on, "
            f"from_pretrained(folder, base='openvla/openvla-7b') or `openvla convert FOLDER OUT --base BASE`.{hint}"
        )

    # Tensors ----------------------------------------------------------------------------------------------------------

    def tensors(self, model: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Every tensor under the names of this package; most are mapped from disk.

        Args:
            model: Those of the weights in the folder, or of the base of its adapter.

        Raises:
            FileNotFoundError: If a file of the adapter is missing.
            ValueError: If files are damaged, or the adapter does not fit.
        """
        film = "vision_backbone" in self.files
        # In a folder with FiLM these are the towers of the base, not those that were trained.
        found = {name: tensor for name, tensor in model.items() if not (film and name.startswith("vision_backbone."))}
        if needs_base(self.folder):
            adapter = read_adapter(self.folder / ADAPTER_WEIGHTS)
            if film:
                adapter = {name: weight for name, weight in adapter.items() if not name.startswith("vision_backbone.")}
            found = merge_lora(found, adapter, self._scaling(adapter), self.folder / ADAPTER_WEIGHTS)
        if film:
            towers = read_checkpoint(self.files["vision_backbone"])
            named = {re.sub(r"(\.blocks\.\d+)\.block\.", r"\1.", name): tensor for name, tensor in towers.items()}
            scaling = self._scaling(named) if any(".lora_A." in name for name in named) else 1.0
            # The original acts with this adapter beside the weights: nothing of it is rounded before the sum.
            named = {name: tensor.float() if ".lora_" in name else tensor for name, tensor in named.items()}
            found |= merge_lora({}, named, scaling, self.files["vision_backbone"])
        for part in self.files:
            if part != "vision_backbone":
                found |= self._part(part)
        return found

    def _part(self, part: str) -> dict[str, torch.Tensor]:
        tensors, file = read_checkpoint(self.files[part]), self.files[part]
        prefix = next((prefix for prefix in HEAD_PREFIXES if f"{prefix}fc2.weight" in tensors), "")
        first = tensors.get(f"{prefix}fc1.weight")
        if first is None or first.ndim != 2:
            raise ValueError(f"'{file}' holds no {part} (tensors {', '.join(list(tensors)[:3])}, ...).")
        return {f"{part}.{name.removeprefix(prefix)}": tensor for name, tensor in tensors.items()}

    def _scaling(self, adapter: Mapping[str, torch.Tensor]) -> float:
        """Of the adapter, also of the part of it that lies in the file of the towers; a `ValueError` if these tensors
        are of another adapter than adapter_config.json."""
        file = self.folder / ADAPTER_CONFIG
        if not file.is_file():
            raise FileNotFoundError(
                f"No {ADAPTER_CONFIG} in '{self.folder}': it says how strong the adapter is, copy it."
            )
        config = read_json(file)
        check_choice(f"peft_type of '{file}'", config.get("peft_type"), ("LORA",))
        changed = [name for name in ("use_rslora", "use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern")
                   if config.get(name)]  # fmt: skip
        if changed or config.get("bias", "none") != "none":
            raise ValueError(f"'{file}': adapters with {', '.join(changed) or 'bias'} are not merged here.")
        rank = config.get("r")
        if not isinstance(rank, int) or rank < 1:
            raise ValueError(f"r={rank!r} in '{file}': expected the rank of the adapter.")
        found = {len(weight) for name, weight in adapter.items() if ".lora_A." in name}
        if found - {rank}:
            raise ValueError(
                f"'{file}' is of an adapter of rank {rank}, the weights in '{self.folder}' are of one of rank "
                f"{', '.join(map(str, sorted(found)))}: take that of their training, it says how strong they are."
            )
        return float(config.get("lora_alpha") or min(rank, 16)) / rank


# Reading --------------------------------------------------------------------------------------------------------------


def read_checkpoint(file: Path) -> dict[str, torch.Tensor]:
    """Tensors of a .pt file, mapped from disk, without the prefix of DistributedDataParallel.

    Raises:
        ValueError: If it is damaged, a Git LFS pointer, or holds something else than tensors.
    """
    check_file(file, "weights file")
    try:
        content = torch.load(file, map_location="cpu", mmap=is_zipfile(file), weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, OSError) as error:
        raise ValueError(
            f"'{file}' cannot be read as a torch checkpoint of tensors alone: {str(error).splitlines()[0]} Was it cut "
            "off? Copy or download it again."
        ) from error
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"'{file}' is no state dict: expected names and tensors, got {type(content).__name__}.")
    if strange := [name for name, value in content.items() if not _is_plain(value)]:
        kind = content[strange[0]]
        raise ValueError(
            f"'{file}': {strange[0]} is {kind.dtype} ({kind.layout}), and weights are plain floating numbers."
        )
    return {str(name).removeprefix("module."): tensor for name, tensor in content.items()}


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and tensor.layout == torch.strided


def read_adapter(file: Path) -> dict[str, torch.Tensor]:
    """Tensors of an adapter that PEFT saved, mapped from disk, without its prefix."""
    check_file(file, "weights file of the adapter")
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name.removeprefix("base_model.model."): tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"'{file}' is damaged or cut off: copy or download it again. {error}") from error


def merge_lora(
    base: Mapping[str, torch.Tensor], adapter: Mapping[str, torch.Tensor], scaling: float, where: Path
) -> dict[str, torch.Tensor]:
    """`base` with the weights of `adapter` added, W + scaling * B A, in the type of W; convolutions as well.

    What is added is rounded to the type of the adapter, as PEFT does it: so the original merged, in bfloat16.

    Args:
        adapter: `X.lora_A.weight`, `X.lora_B.weight` of each matrix `X.weight`; further tensors, among them
            `X.base_layer.weight`, take the place of those of `base`.
        where: File of the adapter, for errors.

    Raises:
        ValueError: If one of the two matrices or what they are added to is missing, or shapes do not fit.
    """
    adapter = {re.sub(r"\.(lora_[AB])\.default\.", r".\1.", name): tensor for name, tensor in adapter.items()}
    merged = dict(base)
    for name, tensor in adapter.items():
        if ".lora_" not in name:
            merged[name.replace(".base_layer.", ".")] = tensor
    for name in [name for name in adapter if ".lora_" in name]:
        target, _, kind = name.rpartition(".lora_")
        first, second = (adapter.get(f"{target}.lora_{side}.weight") for side in "AB")
        weight = merged.get(f"{target}.weight")
        if kind not in ("A.weight", "B.weight") or first is None or second is None or weight is None:
            raise ValueError(f"'{where}': {name} has no counterpart, or no {target}.weight to be added to.")
        if kind == "B.weight":
            continue
        if (second.shape[0], first.shape[1:], second.shape[1]) != (weight.shape[0], weight.shape[1:], first.shape[0]):
            raise ValueError(
                f"'{where}': {target} has an adapter of {list(first.shape)} and {list(second.shape)} for weights of "
                f"{list(weight.shape)}: is it the adapter of another base?"
            )
        delta = (second.float().flatten(1) @ first.float().flatten(1)).view_as(weight).to(second.dtype) * scaling
        merged[f"{target}.weight"] = (weight.float() + delta.float()).to(weight.dtype)
    return merged


__all__ = ["OFTFolder", "find_oft", "oft_folder", "with_weights"]
