"""Several policies over one model, and what torch is told about all of them: nobody changes what another one does."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from openvla import OpenVLAForActionPrediction
from openvla.device import rounds_products
from openvla.observation import Observation
from openvla.policy import OpenVLAPolicy


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def model():
    return OpenVLAForActionPrediction.from_pretrained(ROOT, dtype=torch.float32)


def seen(seed: int) -> Observation:
    image = np.random.default_rng(seed).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    return Observation(images={"primary": image}, state=None, instruction="open the drawer")


def test_what_one_policy_is_shown_is_not_what_others_are(model):
    """`crop` of version 0.1.0 changed the processor of the model, and with it every other policy."""
    pixels = model.processor.image_processor.to_dict()
    other = OpenVLAForActionPrediction.from_pretrained(ROOT)
    other.processor = other.processor.with_pixels("lanczos3", 0.9)
    expected = OpenVLAPolicy(other).act([seen(0), seen(1)])
    cropped, complete, plain = (OpenVLAPolicy(model, crop=crop) for crop in (True, False, None))
    np.testing.assert_array_equal(cropped.act([seen(0), seen(1)]), expected)
    np.testing.assert_array_equal(cropped.act([seen(0)]), expected[:1])
    as_stored = plain.act([seen(0)])
    assert (as_stored != expected[:1]).any()
    np.testing.assert_array_equal(complete.act([seen(0)]), as_stored)  # the embedded policy sees all of an image
    assert model.processor.image_processor.to_dict() == pixels
    with pytest.raises(ValueError, match="pixels='oft' beside crop=True"):
        OpenVLAPolicy.load(str(ROOT), pixels="oft", crop=True)


def test_what_a_caller_writes_into_a_prediction_is_no_draft(model):
    policy = OpenVLAPolicy(model)
    [found] = policy.predict([seen(0)])
    found["token_ids"][:] = -1  # which no draft may hold
    policy.act([seen(0)])
    assert policy.passes == [1]


def test_drafts_are_off_where_products_of_float32_keep_fewer_bits(model):
    """TF32 and its like round as half precision does: a draft then may change a token."""
    policy, before = OpenVLAPolicy(model), torch.get_float32_matmul_precision()
    assert policy._is_exact() and not rounds_products("cuda")
    try:
        for precision in ("high", "medium"):
            torch.set_float32_matmul_precision(precision)
            assert rounds_products("cuda") and rounds_products("cpu") and not policy._is_exact()
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.allow_tf32 = True
        assert rounds_products("cuda")
    finally:
        torch.set_float32_matmul_precision(before)
    assert policy._is_exact() and not rounds_products("cuda")


@pytest.mark.parametrize(
    "options",
    [{"do_sample": True}, {"generation_config": GenerationConfig(do_sample=True)}, {"constrained": np.False_}],
    ids=["drawn", "as configured", "any word"],
)
def test_a_mean_of_what_is_drawn_or_of_words_is_refused(options, model):
    """What was drawn was thrown away, and of words there was an error of numpy."""
    policy = OpenVLAPolicy(model, decoding="mean")
    with pytest.raises(ValueError, match="with decoding='mean'"):
        policy.predict([seen(0)], **options)
    policy.predict([seen(0)], do_sample=False, constrained=True)


def test_an_image_that_was_overwritten_is_another_one(model):
    """A cache remembered the very tensor: with the next image in it, tokens of the last one went on silently."""
    inputs = model.processor("In: What action?\nOut:", seen(0).images["primary"], return_tensors="pt")
    pixels = inputs["pixel_values"].clone()
    with torch.no_grad():
        cache = model(inputs["input_ids"], pixel_values=pixels, use_cache=True).cache
        token = torch.tensor([[900]])
        model(token, pixel_values=pixels, cache=cache)  # beside every token, as written against the published code
        pixels.copy_(model.processor.image_processor(seen(1).images["primary"], return_tensors="pt")["pixel_values"])
        with pytest.raises(ValueError, match="holds another image than pixel_values"):
            model(token, pixel_values=pixels, cache=cache)
