"""Packaged are weights whose parts lie in a folder below; damaged quantized ones and parts elsewhere are refused."""

import json
import shutil

import pytest
import torch

from openvla import OpenVLAForActionPrediction, OpenVLAProcessor
from openvla.conversion import package_checkpoint, quantize_checkpoint


@pytest.fixture
def sharded(small_policy, tmp_path):
    """The small policy in several files that lie in a folder below, as its index says."""
    folder = tmp_path / "sharded"
    OpenVLAForActionPrediction.from_pretrained(small_policy).save_pretrained(folder, max_shard_size="400KB")
    OpenVLAProcessor.from_pretrained(small_policy).save_pretrained(folder)
    name_parts(folder, "parts")
    return folder


def name_parts(folder, place):
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    for name in set(content["weight_map"].values()):
        (folder / place).mkdir(exist_ok=True)
        shutil.move(folder / name, folder / place / name.rpartition("/")[2])
    content["weight_map"] = {key: f"{place}/{name.rpartition('/')[2]}" for key, name in content["weight_map"].items()}
    index.write_text(json.dumps(content))


def test_parts_in_a_folder_below_stay_there(sharded, small_policy, tmp_path):
    loaded = OpenVLAForActionPrediction.from_pretrained(package_checkpoint(sharded, tmp_path / "out")).state_dict()
    expected = OpenVLAForActionPrediction.from_pretrained(small_policy).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in expected.items())


def test_parts_that_are_elsewhere(sharded, tmp_path):
    name_parts(sharded, "../elsewhere")
    for use in (
        OpenVLAForActionPrediction.from_pretrained,
        lambda folder: package_checkpoint(folder, tmp_path / "out"),
    ):
        with pytest.raises(ValueError, match="names '../elsewhere/model-.*', which is not in its folder"):
            use(sharded)
    assert not (tmp_path / "out").exists()


def test_quantized_weights_that_are_cut_off(small_policy, tmp_path):
    file = quantize_checkpoint(small_policy, tmp_path / "int8") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is damaged or cut off"):
        package_checkpoint(tmp_path / "int8", tmp_path / "out")
