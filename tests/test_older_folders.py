"""Folders that version 0.1.0 wrote (tests/fixtures/README.md) load today and act as they did; see docs/api.md."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from openvla import OpenVLAConfig, OpenVLAForActionPrediction, OpenVLAProcessor
from openvla.action_spec import spec_of
from openvla.policy import PIXELS
from openvla.training import merge_adapter


ROOT = Path(__file__).resolve().parents[1]
FIXTURES = ROOT / "tests/fixtures"
ADAPTER = FIXTURES / "older_adapter"
FRAME = ROOT / "examples/frames/drawer-open-v3_step005.png"
BEFORE = json.loads((FIXTURES / "older_settings/older_action.json").read_text())
# Fields of config.json that 0.1.0 did not have, and what their absence means
NEW_FIELDS = {"action_chunk": 1, "camera_names": ["primary"], "action_head": "tokens", "proprio_dim": None}


@pytest.mark.filterwarnings("ignore:.*trained to see")
@pytest.mark.parametrize("merged", [False, True], ids=["adapter", "merged"])
def test_an_adapter_of_an_older_version_acts_as_it_did(merged, tmp_path):
    folder = ADAPTER
    if merged:
        folder = tmp_path / "merged"
        merge_adapter(ADAPTER, folder)
    model = OpenVLAForActionPrediction.from_pretrained(folder).eval()
    assert list(model.norm_stats) == ["lerobot_image"]
    # It was shown the published pixels, which today are asked for (docs/training.md, "What the model sees")
    model.processor = model.processor.with_pixels(**PIXELS["published"])
    found = model.predict_action(FRAME, "open the drawer", return_dict=True)
    bins = 0.0 if not merged else 1 / 128  # merged weights round differently
    np.testing.assert_allclose(found.normalized_actions, BEFORE["normalized"], atol=bins + 1e-9)
    if not merged:
        np.testing.assert_allclose(found.actions, BEFORE["action"], atol=1e-9)
        np.testing.assert_allclose(found.token_probabilities, BEFORE["probabilities"], atol=0.02)


def test_what_an_older_adapter_was_trained_to_see_is_filled_in():
    with pytest.warns(UserWarning, match="finetune.json"):
        processor = OpenVLAProcessor.from_pretrained(ADAPTER)
    assert (processor.image_processor.resize_filter, processor.image_processor.center_crop) == ("lanczos3", 0.9)


def test_what_an_older_run_on_the_hub_was_trained_to_see_is_filled_in(tmp_path):
    repository = tmp_path / "models--me--older"
    shutil.copytree(ADAPTER, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    with pytest.warns(UserWarning, match="finetune.json"):
        processor = OpenVLAProcessor.from_pretrained("me/older", cache_dir=tmp_path, local_files_only=True)
    assert (processor.image_processor.resize_filter, processor.image_processor.center_crop) == ("lanczos3", 0.9)


def test_a_config_without_the_new_fields_means_what_it_meant(tmp_path):
    content = json.loads((ROOT / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in content.items() if k not in NEW_FIELDS}))
    config = OpenVLAConfig.from_pretrained(tmp_path)
    assert {name: getattr(config, name) for name in NEW_FIELDS} == NEW_FIELDS
    for name in ("tiny-openvla-fused", "tiny-openvla-siglip"):  # saved by the original
        published = OpenVLAConfig.from_pretrained(FIXTURES / name)
        assert {field: getattr(published, field) for field in NEW_FIELDS} == NEW_FIELDS


def test_statistics_without_action_spec_give_units_and_guess_little():
    statistics = json.loads((ADAPTER / "dataset_statistics.json").read_text())
    assert "action_spec" not in statistics["lerobot_image"]
    spec = spec_of(statistics, "lerobot_image")
    assert spec.action_dim == 7 and (spec.frame, spec.unit, spec.hz) == (None, None, None)


def test_a_copy_of_an_older_adapter_is_enough(tmp_path):
    shutil.copytree(ADAPTER, tmp_path / "elsewhere")
    with pytest.warns(UserWarning, match="finetune.json"):
        model = OpenVLAForActionPrediction.from_pretrained(tmp_path / "elsewhere")
        assert model.predict_action(FRAME, "open the drawer").shape == (7,)
