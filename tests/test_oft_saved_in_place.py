"""A model of OpenVLA-OFT that is saved into a folder of it."""

import shutil

import numpy as np
import pytest
import torch
from oft import TIMM, saved_by_oft

from openvla import OpenVLAForActionPrediction, OpenVLAProcessor


IMAGE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def act(model) -> list:
    state = None if model.config.proprio_dim is None else [0.1] * model.config.proprio_dim
    images, key = dict.fromkeys(model.camera_names, IMAGE), next(iter(model.norm_stats))
    return model.eval().predict_action(images, "open the drawer", unnorm_key=key, state=state).tolist()


@pytest.mark.filterwarnings("ignore:.*nothing says which cameras the model sees")
@pytest.mark.parametrize(
    ("variant", "told"), [("libero-l1", {}), ("libero-discrete", {"action_head": "parallel_tokens"})]
)
@pytest.mark.parametrize("elsewhere", [False, True])
def test_it_keeps_its_pixels(variant, told, elsewhere, tmp_path):
    folder = saved_by_oft(variant, tmp_path)
    target = shutil.copytree(folder, tmp_path / "copy") if elsewhere else folder
    model = OpenVLAForActionPrediction.from_pretrained(folder, timm_model_kwargs=TIMM, dtype=torch.float32, **told)
    model.save_pretrained(target)
    loaded = OpenVLAForActionPrediction.from_pretrained(target)
    assert OpenVLAProcessor.from_pretrained(target).image_processor.jpeg_quality == 95
    np.testing.assert_allclose(act(loaded), act(model), atol=1e-4)
