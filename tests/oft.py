"""Tiny folders as OpenVLA-OFT saves them, written from the fixtures: see tests/fixtures/README.md."""

import json
import shutil
from collections import defaultdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny import FIXTURES, TINY

from openvla import OpenVLAForActionPrediction
from openvla.oft_openvla import merge_lora


OFT = FIXTURES / "oft"
# What `from_pretrained` is told of a folder beside its name
GIVEN: dict[str, dict] = {
    "libero-l1": {},
    "aloha-film-l1": {},
    "libero-discrete": {"action_head": "parallel_tokens"},
    "libero-diffusion": {"base": "base"},
}
ADAPTER = "lora_adapter/adapter_model.safetensors"
TIMM = [{"embed_dim": 16, "depth": 3, "num_heads": 2}, {"embed_dim": 24, "depth": 4, "num_heads": 2}]


def base_weights() -> dict[str, torch.Tensor]:
    """What all variants were fine-tuned from. Rows of the vocabulary that no golden reads are zero."""
    weights = load_file(OFT / "base.safetensors")
    rows = {name: weights.pop(name) for name in ("embedding_rows", "embeddings", "head_rows", "head")}
    for name, kind in (("model.embed_tokens", ("embedding_rows", "embeddings")), ("lm_head", ("head_rows", "head"))):
        table = torch.zeros(32064, 16)
        table[rows[kind[0]]] = rows[kind[1]]
        weights[f"language_model.{name}.weight"] = table
    return weights


def saved_by_oft(variant: str, folder: Path) -> Path:
    """The folder of a variant in `folder`, beside "base"."""
    base, target = base_weights(), folder / variant
    target.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "preprocessor_config.json",
                 "processor_config.json", "generation_config.json"):  # fmt: skip
        shutil.copyfile(TINY[0].folder / name, target / name)
    if variant == "base":
        shutil.copyfile(OFT / "config.json", target / "config.json")
        save_file(base, target / "model.safetensors", metadata={"format": "pt"})
        return target
    shutil.copyfile(OFT / variant / "dataset_statistics.json", target / "dataset_statistics.json")
    weights = "libero-l1" if variant == "libero-discrete" else variant
    files: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for key, tensor in load_file(OFT / f"{weights}.safetensors").items():
        file, _, name = key.rpartition("/")
        files[file][name] = tensor
    adapter = files.pop(ADAPTER)
    if variant != "libero-discrete":
        (target / "lora_adapter").mkdir()
        shutil.copyfile(OFT / variant / "adapter_config.json", target / "lora_adapter/adapter_config.json")
        save_file(adapter, target / ADAPTER, metadata={"format": "pt"})
        for file, tensors in files.items():
            torch.save(_complete(tensors, base) if file.startswith("vision_backbone") else tensors, target / file)
    if variant != "libero-diffusion":
        shutil.copyfile(OFT / "config.json", target / "config.json")
        config = json.loads((OFT / weights / "adapter_config.json").read_text())
        names = {name: name.removeprefix("base_model.model.") for name in adapter}
        merged = merge_lora(
            base, {names[name]: adapter[name] for name in names}, config["lora_alpha"] / config["r"], OFT
        )
        save_sharded(merged, target)
    return target


def _complete(towers: dict[str, torch.Tensor], base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With the weights under the adapter, which are those of the base, under the names they have in a FiLM folder."""
    found = {}
    for name, tensor in base.items():
        if name.startswith("vision_backbone."):
            before, blocks, after = name.partition(".blocks.")
            number, _, rest = after.partition(".")
            named = f"{before}.blocks.{number}.block.{rest}" if blocks else name
            owner, _, kind = named.rpartition(".")
            adapted = f"{owner}.lora_A.default.weight" in towers
            found[f"{owner}.base_layer.{kind}" if adapted else named] = tensor
    return {**found, **towers}


def save_sharded(weights: dict[str, torch.Tensor], folder: Path) -> None:
    """In two parts with an index, as large models are saved."""
    names = sorted(weights)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, own in parts.items():
        save_file({name: weights[name].contiguous() for name in own}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, own in parts.items() for name in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def given(variant: str, folder: Path) -> dict:
    """Arguments of `from_pretrained` for a variant in `folder`; a published config.json says nothing of the towers."""
    told = {name: str(folder / value) if name == "base" else value for name, value in GIVEN[variant].items()}
    return {**told, "timm_model_kwargs": TIMM}


def load_oft(variant: str, folder: Path, **options) -> OpenVLAForActionPrediction:
    """The model of a variant that was saved to `folder`."""
    options = {"dtype": torch.float32, **given(variant, folder), **options}
    return OpenVLAForActionPrediction.from_pretrained(folder / variant, **options).eval()
