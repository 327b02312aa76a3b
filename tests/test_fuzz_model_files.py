"""Model folders under seeded damage: files cut, emptied, deleted, replaced by pointers, fields of JSON given other
values, tensors renamed, dropped, resized. A folder either predicts, or its error says why not.

A field that becomes another valid value (an epsilon, a seed) makes another model, which nothing can find out: there it
is only asked that nothing breaks inside and that the action is finite.
"""

import copy
import json
import os
import random
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TINY, golden_image

from openvla import OpenVLAConfig, OpenVLAForActionPrediction, OpenVLAProcessor
from openvla.files_openvla import LFS_POINTER


IMAGE = golden_image(0).resize((64, 48))  # read once, and soon resized
DOCUMENTED = (ValueError, KeyError, FileNotFoundError)
JSON_VALUES = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2.5,
    1e400,
    float("nan"),
    10**12,
    "",
    "x",
    "\ud800",
    [],
    [None],
    {},
    {"x": 1},
)
# What becomes of a file as it is: kind -> its new content, None to delete it.
FILE_DAMAGE = {
    "deleted": lambda content, rng: None,
    "emptied": lambda content, rng: b"",
    "cut": lambda content, rng: content[: rng.randrange(len(content))],
    "pointer": lambda content, rng: LFS_POINTER + b"v1\noid sha256:0\nsize 1\n",
    "list": lambda content, rng: b"[]",
    "null": lambda content, rng: b"null",
    "text": lambda content, rng: b"<html>404</html>",
    "bytes": lambda content, rng: bytes(rng.randrange(256) for _ in range(64)),
}


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """A tiny published folder, of whose 32,000 tokens the bytes, the characters of ASCII and those of actions are left:
    words and merges take most of the time of loading a folder."""
    folder = tmp_path_factory.mktemp("model")
    for file in TINY[1].folder.iterdir():
        shutil.copyfile(file, folder / file.name)

    def change(name: str, **fields) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, **fields}))

    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    ids = tokenizer["model"]["vocab"]
    character = re.compile("[!-~▁]")
    kept = [name for name, id in ids.items() if not 259 <= id < 32000 - 256 or character.fullmatch(name)]
    rows, pad = torch.tensor([ids[name] for name in kept]), len(kept)
    few = {"<PAD>": pad, **{name: row for row, name in enumerate(kept)}}
    added = [{**token, "id": few[token["content"]]} for token in tokenizer["added_tokens"]]
    model = {**tokenizer["model"], "vocab": {name: few[name] for name in kept}, "merges": []}
    change("tokenizer.json", model=model, added_tokens=added)
    decoder = {str(token["id"]): {key: token[key] for key in token if key != "id"} for token in added}
    change("tokenizer_config.json", added_tokens_decoder=decoder)
    change("added_tokens.json", **{"<PAD>": pad})
    change("generation_config.json", pad_token_id=pad)
    text = json.loads((folder / "config.json").read_text())["text_config"]
    text |= {"pad_token_id": pad, "vocab_size": pad + 64}
    change("config.json", timm_model_kwargs=TINY[1].timm_model_kwargs, pad_token_id=pad, text_config=text)
    weights = load_file(folder / "model.safetensors")
    for name in ("language_model.lm_head.weight", "language_model.model.embed_tokens.weight"):
        weights[name] = torch.cat([weights[name][rows], weights[name][32000:]])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert outcome(folder, weights=True) == "right"
    return folder


@pytest.fixture
def damaged(original, tmp_path):
    """Makes a copy of the folder in which one file has another content."""

    def make(name: str, content: bytes | None) -> Path:
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for file in original.iterdir():
            if file.name != name:
                os.symlink(file.resolve(), folder / file.name)
        if content is not None:
            (folder / name).write_bytes(content)
        return folder

    return make


def change_field(content: dict, rng: random.Random) -> dict:
    """One field, at any depth, dropped, renamed or given another value."""
    parent, key = content, rng.choice(list(content))
    while isinstance(parent[key], dict | list) and parent[key] and rng.random() < 0.7:
        parent = parent[key]
        key = rng.randrange(len(parent)) if isinstance(parent, list) else rng.choice(list(parent))
    kind = rng.choice(("drop", "replace", "replace", "replace", "rename"))
    if kind == "replace" or isinstance(parent, list):
        parent[key] = copy.deepcopy(rng.choice(JSON_VALUES))
    else:
        value = parent.pop(key)
        if kind == "rename":
            parent[f"{key}_"] = value
    return content


def outcome(folder: Path, weights: bool, config: bool = True) -> str:
    """ "right" or "refused"; anything else is raised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if config:
                OpenVLAConfig.from_pretrained(folder)
            processor = OpenVLAProcessor.from_pretrained(folder)
            inputs = processor(processor.format_prompt("open the drawer"), IMAGE)
            if weights:
                model = OpenVLAForActionPrediction.from_pretrained(folder, dtype=torch.float32).eval()
                key = next(iter(model.norm_stats or {"x": None}))
                action = model.predict_action(IMAGE, "open the drawer", unnorm_key=key)
                assert action.ndim == 1 and np.isfinite(action).all()
        except DOCUMENTED as error:
            assert len(str(error)) > 15, f"{type(error).__name__} says nothing: {error}"
            return "refused"
    assert torch.isfinite(inputs["pixel_values"]).all()
    return "right"


def action_of(folder: Path) -> np.ndarray:
    model = OpenVLAForActionPrediction.from_pretrained(folder, dtype=torch.float32).eval()
    return model.predict_action(IMAGE, "open the drawer", unnorm_key=next(iter(model.norm_stats)))


@pytest.mark.parametrize("kind", FILE_DAMAGE)
def test_damaged_files(kind, original, damaged):
    """Every JSON file of the folder, damaged in every way: what a prediction cannot do without is refused."""
    rng = random.Random(kind)
    for file in sorted(original.iterdir()):
        if file.suffix == ".json":
            folder = damaged(file.name, FILE_DAMAGE[kind](file.read_bytes(), rng))
            found = outcome(folder, weights=file.name in ("generation_config.json", "dataset_statistics.json"))
            optional = kind == "deleted" and file.name == "dataset_statistics.json"  # config.json has them as well
            if file.name in ("config.json", "tokenizer.json", "dataset_statistics.json") and not optional:
                assert found == "refused", file.name


@pytest.mark.parametrize(
    ("name", "rounds"), [("config.json", 250), ("preprocessor_config.json", 120), ("tokenizer_config.json", 60)]
)
def test_changed_fields(name, rounds, original, damaged):
    rng, content = random.Random(name), json.loads((original / name).read_text())
    found = []
    for step in range(rounds):
        text = json.dumps(change_field(copy.deepcopy(content), rng))
        try:
            found.append(outcome(damaged(name, text.encode()), weights=step % 12 == 0, config=name == "config.json"))
        except Exception as error:
            raise AssertionError(f"{name}, round {step}: {type(error).__name__}: {error}\n{text[:2000]}") from error
    assert found.count("refused") > rounds // 10, "the damage has lost its teeth"


def damage_weights(tensors: dict[str, torch.Tensor], rng: random.Random) -> dict[str, torch.Tensor]:
    name = rng.choice(list(tensors))
    kind = rng.choice(("drop", "rename", "resize", "prefix", "extra", "nan", "swap"))
    if kind == "drop":
        del tensors[name]
    elif kind == "rename":
        tensors[name.replace("weight", "gamma") + "_"] = tensors.pop(name)
    elif kind == "resize":
        tensors[name] = torch.cat([tensors[name], tensors[name]])
    elif kind == "prefix":
        prefix = rng.choice(("module.", "_orig_mod.", "base_model.model.", "model.", "x."))
        tensors = {prefix + key: value for key, value in tensors.items()}
    elif kind == "extra":
        tensors[f"{name}.lora_A"] = torch.zeros(2)
    elif kind == "nan":
        name = "projector.fc2.weight"
        tensors[name] = torch.full_like(tensors[name], rng.choice((float("nan"), float("inf"))))
    else:
        other = rng.choice([key for key in tensors if tensors[key].shape != tensors[name].shape])
        tensors[name], tensors[other] = tensors[other], tensors[name]
    return tensors


@pytest.mark.parametrize("seed", range(3))
def test_damaged_weights_are_refused(seed, original, damaged, tmp_path):
    rng, tensors = random.Random(seed), load_file(original / "model.safetensors")
    for _ in range(8):
        file = tmp_path / "changed.safetensors"
        changed = damage_weights(dict(tensors), rng)
        save_file({key: value.contiguous().clone() for key, value in changed.items()}, file, metadata={"format": "pt"})
        folder = damaged("model.safetensors", file.read_bytes())
        found = outcome(folder, weights=True)
        if all(key.startswith("model.") for key in changed):  # transformers 5.4 understands its own prefix
            assert found == "refused" or (action_of(folder) == action_of(original)).all()
        else:
            assert found == "refused"
    whole = (original / "model.safetensors").read_bytes()
    header = int.from_bytes(whole[:8], "little")
    for cut in (b"", whole[:4], whole[: 8 + header // 2], whole[: 8 + header], whole[:-1], LFS_POINTER + b"v1\n"):
        assert outcome(damaged("model.safetensors", cut), weights=True) == "refused"
