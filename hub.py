"""Models by folder or Hub id: where they lie on this machine, what they are called elsewhere, their statistics."""

import hashlib
import os
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .action_tokenizer import check_statistics, read_statistics
from .adapters_openvla import find_adapter, find_base, read_belongings
from .choices_openvla import closest
from .configuration_openvla import OpenVLAConfig
from .files_openvla import local_folder
from .folders import weights_digest
from .oft_openvla import COMPONENTS, PART_FILE, find_oft


PACKAGE = Path(__file__).resolve().parent  # its root is a model, too
FILES = ["*.json", "*.safetensors", "tokenizer.model", "README.md", *map(PART_FILE.format, COMPONENTS)]
# What decides a model's actions beside its weights
KINDS = {
    "statistics": ("dataset_statistics.json",),
    "config": ("config.json", "adapter_config.json"),
    "processor": ("processor_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"),
}


def model_folder(model: str | os.PathLike, revision: str | None = None) -> Path:
    """A local folder as it is, or the downloaded snapshot of a Hub id.

    Raises:
        FileNotFoundError: If `model` is neither; says which of the two it looks like and what can be done.
    """
    path = Path(model).expanduser()
    hint = "" if path.exists() else closest(path.name, _folders(path.parent))
    try:
        folder = local_folder(path if str(model).startswith("~") else model)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}{hint}") from None
    if folder is not None:
        return folder
    try:
        return Path(snapshot_download(str(model), revision=revision, allow_patterns=FILES))
    except (OSError, HFValidationError) as error:
        raise FileNotFoundError(
            f"'{model}' is neither a folder here nor a Hub repository that can be reached.{hint} "
            f"{_remedy(str(model), revision, error)}"
        ) from error


def _folders(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    except OSError:
        return []


def _remedy(repository: str, revision: str | None, error: Exception) -> str:
    """What the Hub refused, and the way out. Gated repositories are a kind of those not found."""
    if isinstance(error, HFValidationError):
        return "It is no Hub id either: expected 'owner/name' of letters, digits, '-', '_' and '.'."
    if isinstance(error, GatedRepoError):
        return (
            f"Its owner asks for consent: accept the terms at https://huggingface.co/{repository}, then log in "
            "(hf auth login)."
        )
    if isinstance(error, RepositoryNotFoundError):
        return "The Hub knows no such repository: check the id; if it is private, log in (hf auth login)."
    if isinstance(error, RevisionNotFoundError):
        return f"The repository has no branch, tag or commit '{revision}'."
    if HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set and the cache does not hold it: unset it to download, or give a folder."
    return (
        "Check the network, or download it where there is one "
        f"(hf download {repository} --local-dir FOLDER) and give the folder. ({type(error).__name__})"
    )


def published_name(model: str | os.PathLike) -> str:
    """What reports and data sets call a model: its Hub id, or the name of its folder, which is nobody's path."""
    path = Path(model).expanduser()
    if path.resolve() == PACKAGE:
        return "embedded policy"
    return path.resolve().name if path.is_dir() or str(model).count("/") != 1 else str(model)


def variant_of(folder: Path, action_head: str | None = None, action_chunk: int | None = None) -> dict[str, Any]:
    """What is said of a model folder of OpenVLA-OFT, as `from_pretrained` takes it.

    Raises:
        ValueError: If something is, and the folder is of another kind.
    """
    told = {"action_head": action_head, "action_chunk": action_chunk}
    told = {name: value for name, value in told.items() if value is not None}
    if told and find_oft(folder, action_head) is None:
        shown = ", ".join(f"{name}={value!r}" for name, value in told.items())
        raise ValueError(
            f"{shown}: only for folders of OpenVLA-OFT, and '{folder}' is none: its config.json says what it is."
        )
    return told


def config_of(model: str | os.PathLike, **told: Any) -> OpenVLAConfig:
    """The configuration of a folder or Hub id; of an adapter that of its base, with what its training changed in it.

    Args:
        told: Of `variant_of`.
    """
    adapter = find_adapter(model)
    if adapter is None:
        return OpenVLAConfig.from_pretrained(model, **told)
    config = OpenVLAConfig.from_pretrained(find_base(adapter))
    for name, value in read_belongings(adapter).get("model", {}).items():
        setattr(config, name, value)
    return config


def statistics_of(folder: Path, config: OpenVLAConfig | None = None) -> dict[str, Any]:
    """Action statistics of a model folder: dataset_statistics.json, else those of its config; a `ValueError` without.
    Of an adapter those that a model has which is loaded from it: of its adapter_config.json, else of its base.

    Args:
        config: Default: that of the folder.
    """
    file = folder / "dataset_statistics.json"
    found = read_statistics(file) if file.is_file() else {}
    if not found and (adapter := find_adapter(folder)) is not None:
        return read_belongings(adapter).get("norm_stats") or statistics_of(model_folder(find_base(adapter)))
    if file.is_file():
        return found
    config = config or OpenVLAConfig.from_pretrained(folder)
    if not config.norm_stats:
        raise ValueError(
            f"'{folder}' has no action statistics, so its actions would have no units: put the dataset_statistics.json "
            "of its training there."
        )
    return check_statistics(config.norm_stats, f"'{folder / 'config.json'}' (norm_stats)")


def file_digests(folder: Path, weights: bool = True) -> dict[str, str]:
    """Digests of what decides the actions of a model folder, by kind: weights, base (the weights under an adapter),
    statistics, config, processor. Kinds of which there is no file are left out.

    Args:
        weights: False leaves the weights out, which may not be there.
    """
    found = {"weights": weights_digest(folder)} if weights else {}
    if weights and (adapter := find_adapter(folder)) is not None:
        found["base"] = weights_digest(model_folder(find_base(adapter)))
    for kind, names in KINDS.items():
        files = [folder / name for name in names if (folder / name).is_file()]
        if files:
            content = b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)
            found[kind] = hashlib.sha256(content).hexdigest()[:32]
    return found
