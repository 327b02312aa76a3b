"""What a model was trained to see, stored with its processor: the same pixels and actions from any door."""

import json
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from openvla import OpenVLAForActionPrediction, OpenVLAImageProcessor, OpenVLAProcessor
from openvla.cli import app
from openvla.conversion import package_checkpoint
from openvla.data import Episode
from openvla.data.augment import ImageAugmentation
from openvla.data.collate import ActionCollator
from openvla.data.samples import FrameSamples
from openvla.observation import Observation
from openvla.pixels_openvla import center_crop, resize_lanczos3
from openvla.policy import PIXELS, OpenVLAPolicy
from openvla.training import FinetuneOptions, finetune, merge_adapter


ROOT = Path(__file__).resolve().parents[1]
DEMOS = Path(__file__).parent / "fixtures" / "demos"
NOISE = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
WIDE = np.asarray(Image.fromarray(NOISE).resize((640, 480), Image.Resampling.BICUBIC))  # no size of a model
SIZES = {"input_sizes": [[3, 32, 32]], "image_resize_strategy": "resize-naive"}


# The fields -----------------------------------------------------------------------------------------------------------


def pixels(processor, image=WIDE, **options) -> np.ndarray:
    return processor(image, return_tensors="np", **options)["pixel_values"]


def test_without_the_fields_pixels_are_the_published_ones():
    published = OpenVLAImageProcessor(**SIZES)
    assert (published.resize_filter, published.center_crop) == (None, None)
    assert published.trained_pixels(WIDE) is WIDE
    np.testing.assert_array_equal(pixels(published), pixels(OpenVLAImageProcessor(**SIZES, **PIXELS["published"])))


def test_the_fields_are_a_step_before_the_published_way():
    published, trained = OpenVLAImageProcessor(**SIZES), OpenVLAImageProcessor(**SIZES, **PIXELS["libero"])
    small = resize_lanczos3(WIDE, (32, 32))
    np.testing.assert_array_equal(pixels(trained), pixels(published, center_crop(small, 0.9)))
    np.testing.assert_array_equal(pixels(trained, do_center_crop=False), pixels(published, small))
    assert not np.array_equal(pixels(trained), pixels(published))
    alone = OpenVLAImageProcessor(**SIZES, center_crop=0.5)  # at the size of the camera, before the published resize
    np.testing.assert_array_equal(pixels(alone), pixels(published, center_crop(WIDE, 0.5)))
    assert np.array_equal(center_crop(WIDE, 1.0), WIDE)


@pytest.mark.parametrize("fields", PIXELS.values(), ids=PIXELS)
def test_the_fields_are_saved(fields, tmp_path):
    OpenVLAImageProcessor(**SIZES, **fields).save_pretrained(tmp_path)
    assert fields.items() <= json.loads((tmp_path / "preprocessor_config.json").read_text()).items()
    again = OpenVLAImageProcessor.from_pretrained(tmp_path)
    assert {name: getattr(again, name) for name in fields} == fields


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"resize_filter": "lanczos"}, "resize_filter='lanczos' is unknown. Did you mean 'lanczos3'"),
        ({"resize_filter": ["lanczos3"]}, "resize_filter"),
        *(({"center_crop": value}, "center_crop=.*above 0 and up to 1") for value in (0, 1.1, True, "0.9", np.nan)),
    ],
    ids=str,
)
def test_wrong_fields(wrong, message):
    with pytest.raises(ValueError, match=message):
        OpenVLAImageProcessor(**SIZES, **wrong)


# Training -------------------------------------------------------------------------------------------------------------


def frame() -> Episode:
    return Episode("open the drawer", np.zeros((1, 7), np.float32), {"image": [WIDE]}, None, "mine", 0)


def test_held_out_frames_are_seen_as_in_a_prediction():
    """Cropped once: by the samples, not again by the collator."""
    processor = OpenVLAProcessor.from_pretrained(ROOT).with_pixels(**PIXELS["libero"])
    sample = FrameSamples(processor.image_processor)[0, frame()]
    np.testing.assert_array_equal(sample["image"], center_crop(resize_lanczos3(WIDE), 0.9))
    batch = ActionCollator(processor)([sample])
    assert torch.equal(batch["pixel_values"], processor("x", WIDE)["pixel_values"])


def test_a_random_crop_takes_the_place_of_the_center_crop():
    images = OpenVLAProcessor.from_pretrained(ROOT).with_pixels(**PIXELS["libero"]).image_processor
    augmentation = ImageAugmentation()
    sample = FrameSamples(images, augmentation, seed=3)[5, frame()]
    expected = augmentation(resize_lanczos3(WIDE), np.random.default_rng([3, 5]))
    np.testing.assert_array_equal(sample["image"], expected)
    assert augmentation.crop_area == PIXELS["libero"]["center_crop"]


# Doors ----------------------------------------------------------------------------------------------------------------


def train(output: Path, **changes) -> Path:
    pytest.importorskip("accelerate", reason="training needs the [train] extra")
    pytest.importorskip("peft", reason="training needs the [train] extra")
    made = {"steps": 1, "batch_size": 2, "rank": 4, "shuffle_buffer": 8, "name": "mine", "logging": "none"}
    made |= {"dataset": str(DEMOS / "lerobot_image"), "save_every": 1, "held_out": 0.0, **changes}
    return finetune(FinetuneOptions(output=str(output), **made))


@pytest.fixture(scope="module")
def base(small_policy, tmp_path_factory) -> Path:
    """The small policy with weights 20 times as large: other pixels are other tokens, also cropped ones."""
    folder = Path(shutil.copytree(small_policy, tmp_path_factory.mktemp("base") / "base"))
    model = OpenVLAForActionPrediction.from_pretrained(small_policy)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(20 if parameter.ndim > 1 else 1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory) -> Path:
    """Runs with random crops of all weights and of an adapter, and one without crops."""
    folder = tmp_path_factory.mktemp("runs")
    train(folder / "full", model=str(base), strategy="full")
    train(folder / "lora", model=str(base), strategy="lora", eval_every=0)
    train(folder / "plain", model=str(base), strategy="last_layer", image_aug=False)
    return folder


def expected_action(folder: Path, fields: dict) -> list[float]:
    """From pixels that are made by hand, shown to a model that does nothing to them."""
    model = OpenVLAForActionPrediction.from_pretrained(folder).eval()
    model.processor = model.processor.with_pixels(**PIXELS["published"])
    image = resize_lanczos3(WIDE)
    if fields["center_crop"]:
        image = center_crop(image, fields["center_crop"])
    return model.predict_action(image, "open the drawer").tolist()


def stored(folder: Path) -> dict:
    content = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    return {name: content[name] for name in ("resize_filter", "center_crop")}


WITHOUT_THE_PACKAGE = """
import json, sys
import numpy as np
from transformers import AutoModel, AutoProcessor
image = np.load("image.npy")
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
inputs = processor(processor.format_prompt("open the drawer"), image)
actions = [model.predict_action(**inputs).tolist(), model.predict_action(image, "open the drawer").tolist()]
print(json.dumps({"actions": actions, "openvla": "openvla" in sys.modules}))
"""


@pytest.mark.parametrize("name", ["full", "lora", "plain"])
def test_every_door_shows_what_was_trained(runs, base, name, tmp_path):
    fields = PIXELS["libero"] | ({"center_crop": None} if name == "plain" else {})
    run = runs / name
    assert stored(run) == fields
    expected = expected_action(run, fields)
    model = OpenVLAForActionPrediction.from_pretrained(run).eval()
    assert model.predict_action(WIDE, "open the drawer").tolist() == expected
    processor = OpenVLAProcessor.from_pretrained(run)
    assert model.predict_action(**processor(processor.format_prompt("open the drawer"), WIDE)).tolist() == expected
    assert model.predict_action(WIDE[:, ::-1], "open the drawer").tolist() != expected  # the image counts
    other = fields | {"center_crop": 0.9 if fields["center_crop"] is None else None}
    assert expected_action(run, other) != expected  # and so does the crop

    policy = OpenVLAPolicy.load(str(run))  # of `evaluate`, `demo`, and of `record` with a student
    assert policy.act([Observation({"image": WIDE}, np.zeros(8), "open the drawer")])[0].tolist() == expected

    Image.fromarray(WIDE).save(tmp_path / "frame.png")
    command = ["--model", str(run), "--image", str(tmp_path / "frame.png"), "--instruction", "open the drawer"]
    printed = CliRunner().invoke(app, ["predict", "--json", "--device", "cpu", *command])
    assert printed.exit_code == 0, printed.output
    assert json.loads(printed.stdout)["action"] == pytest.approx(expected, abs=1e-6)

    whole = run
    if name == "lora":
        checkpoint = run / "checkpoints" / "checkpoint-1"
        assert stored(checkpoint) == fields
        found = OpenVLAForActionPrediction.from_pretrained(checkpoint).eval().predict_action(WIDE, "open the drawer")
        assert found.tolist() == expected
        from peft import PeftModel

        model = OpenVLAForActionPrediction.from_pretrained(base)  # as PEFT users do: nothing of the folder is read
        assert PeftModel.from_pretrained(model, run).eval().predict_action(WIDE, "open the drawer").tolist() == expected
        whole = tmp_path / "merged"
        merge_adapter(run, whole)
        assert stored(whole) == fields
        expected = expected_action(whole, fields)  # merged weights round differently
        found = OpenVLAForActionPrediction.from_pretrained(whole).eval().predict_action(WIDE, "open the drawer")
        assert found.tolist() == expected

    packaged = package_checkpoint(whole, tmp_path / "packaged")
    assert stored(packaged) == fields
    if name != "lora":
        return  # one process without the package is enough
    np.save(tmp_path / "image.npy", WIDE)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ran = processes.run(WITHOUT_THE_PACKAGE, packaged, cwd=tmp_path, env=environment, server="transformers")
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    assert not found["openvla"]
    np.testing.assert_allclose(found["actions"], [expected, expected], rtol=0, atol=1e-6)


def test_a_run_that_begins_with_an_earlier_one_has_its_own_pixels(runs, tmp_path):
    train(tmp_path / "again", model=str(runs / "full"), strategy="last_layer", image_aug=False)
    assert stored(tmp_path / "again") == {"resize_filter": "lanczos3", "center_crop": None}


def test_the_embedded_policy_sees_what_it_was_trained_on():
    """Without random crops (examples/policy.sh)."""
    assert stored(ROOT) == {"resize_filter": "lanczos3", "center_crop": None}
    policy = OpenVLAPolicy.load(str(ROOT))
    found = policy.act([Observation({"image": WIDE}, np.zeros(8), "open the drawer")])[0].tolist()
    assert found == expected_action(ROOT, stored(ROOT))


def test_other_pixels_than_those_stored(runs):
    assert (
        OpenVLAPolicy.load(str(runs / "full"), pixels="published").model.processor.image_processor.center_crop is None
    )
    shown = OpenVLAPolicy.load(str(runs / "plain"), pixels="libero").model.processor.image_processor
    assert (shown.resize_filter, shown.center_crop) == ("lanczos3", 0.9)
    with pytest.raises(ValueError, match="pixels='librero' is unknown. Did you mean 'libero'"):
        OpenVLAPolicy.load(str(runs / "plain"), pixels="librero")


# Runs of older versions -----------------------------------------------------------------------------------------------


def of_older_version(run: Path, folder: Path) -> Path:
    """A run as older versions wrote it: what the model was trained to see stands in finetune.json alone."""
    shutil.copytree(run, folder)
    for file in folder.rglob("*_config.json"):
        content = json.loads(file.read_text())
        processor = (content.get("auto_mapping") or {}).get("openvla", {}).get("processor", content)
        for name in PIXELS["published"]:
            processor.get("image_processor", {}).pop(name, None)
        file.write_text(json.dumps(content))
    return folder


def said(record: list) -> list[str]:
    return [str(warning.message) for warning in record if "older version" in str(warning.message)]


@pytest.mark.parametrize(
    ("name", "place"), [("full", ""), ("lora", ""), ("lora", "checkpoints/checkpoint-1"), ("plain", "")]
)
def test_runs_of_older_versions_are_shown_what_they_were_trained_on(runs, name, place, tmp_path):
    expected = OpenVLAForActionPrediction.from_pretrained(runs / name / place).eval().predict_action(WIDE, "stop")
    older = of_older_version(runs / name, tmp_path / "older") / place
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        found = OpenVLAForActionPrediction.from_pretrained(older).eval().predict_action(WIDE, "stop")
    np.testing.assert_array_equal(found, expected)
    (message,) = said(record)
    assert f"center_crop={None if name == 'plain' else 0.9}" in message and "Save the processor" in message

    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        OpenVLAProcessor.from_pretrained(older).save_pretrained(older)  # what the warning says to do
        assert len(said(record)) == 1
        found = OpenVLAForActionPrediction.from_pretrained(older).eval().predict_action(WIDE, "stop")
        assert len(said(record)) == 1
    np.testing.assert_array_equal(found, expected)


def test_other_folders_are_not_runs_of_older_versions(runs, tmp_path):
    older = of_older_version(runs / "full", tmp_path / "older")
    for content in ({"task": "tune a guitar"}, None):
        (older / "finetune.json").unlink()
        if content:
            (older / "finetune.json").write_text(json.dumps(content))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert OpenVLAProcessor.from_pretrained(older).image_processor.center_crop is None


@pytest.mark.parametrize("asked", [None, True, False])
def test_evaluations_of_older_versions_go_on_with_the_same_pixels(runs, asked, tmp_path):
    """They resized with lanczos3, and cropped where it was asked for or finetune.json said so."""
    pytest.importorskip("metaworld", reason="`evaluate` needs the [sim] extra")
    from openvla.evaluation.begun import check_older_pixels

    for name in ("full", "plain"):
        crop = name == "full" if asked is None else asked
        for pixels, fields in ((None, stored(runs / name)), *PIXELS.items()):
            policy = OpenVLAPolicy.load(str(runs / name), pixels=pixels)
            for size in (224, 256):  # of the camera: nothing is resized where it is that of the model
                same = fields["center_crop"] == (0.9 if crop else None)
                if same and (size == 224 or (fields["resize_filter"] and "jpeg_quality" not in fields)):
                    check_older_pixels(asked, runs / name, policy, size)
                else:
                    with pytest.raises(ValueError, match="other pixels.*choose another output folder"):
                        check_older_pixels(asked, runs / name, policy, size)
