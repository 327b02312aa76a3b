"""Hostile inputs of prediction: the right action, or an error that says why not.

One generator of calls for each kind; every call is drawn from a seed, so that a failure can be repeated alone.
"""

import io
import math
import random
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from test_modeling_openvla import small_config
from tiny import TINY

from openvla import OpenVLAForActionPrediction, OpenVLAImageProcessor, OpenVLAProcessor, load_image
from openvla.prompts_openvla import QUESTION


DOCUMENTED = (ValueError, KeyError, FileNotFoundError)
# Errors of libraries that happen to be ValueErrors: what is said in them is not said to a user.
FROM_DEEP_INSIDE = (UnicodeError,)


class Prediction:
    """A model of four patches with a real tokenizer, and one right call to start from."""

    def __init__(self):
        torch.manual_seed(0)
        published = TINY[0].processor()
        # The size of the tokenizer's vocabulary, of the towers' input.
        text_config = {**small_config().text_config.to_dict(), "vocab_size": 32064}
        self.model = OpenVLAForActionPrediction(small_config(text_config=text_config, empty_token_id=29871)).eval()
        self.processor = OpenVLAProcessor(
            OpenVLAImageProcessor(True, "resize-naive", input_sizes=[[3, 28, 28]] * 2), published.tokenizer
        )
        self.model.processor = self.processor
        self.frame = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
        self.inputs = dict(self.processor(self.processor.format_prompt("open the drawer"), self.frame))


@pytest.fixture(scope="module")
def prediction() -> Prediction:
    return Prediction()


# Values that have no business where they are put ----------------------------------------------------------------------

ANYTHING = (
    None, True, False, 0, 1, -1, 2.5, math.nan, math.inf, 10**30, "", " ", "open", "\ud800", "\0", b"", b"open", [],
    [[]], [None], {}, {"a": 1}, set(), (), object(), int, np.float32(1), np.array([]), np.array(3), np.array(["open"]),
    np.array([None]), torch.tensor(1.0), torch.zeros(0), torch.zeros(1, 1), Ellipsis, 1j,
)  # fmt: skip


def encoded(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def damaged_file(rng: random.Random, frame: np.ndarray) -> bytes:
    data = bytearray(encoded(Image.fromarray(frame), rng.choice(("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM"))))
    kind = rng.choice(("cut", "flip", "insert", "whole"))
    if kind == "cut":
        del data[rng.randrange(len(data)) :]
    for _ in range(rng.randint(1, 8)):
        position = rng.randrange(len(data) + 1)
        if kind == "flip" and position < len(data):
            data[position] = rng.randrange(256)
        elif kind == "insert":
            data[position:position] = rng.randbytes(3)
    return bytes(data)


def any_array(rng: random.Random) -> np.ndarray:
    shape = [rng.choice((0, 1, 2, 3, 4, 5, 8, 28)) for _ in range(rng.choice((0, 1, 2, 3, 3, 3, 4, 5)))]
    if len(shape) == 3 and rng.random() < 0.7:
        shape[rng.choice((0, 2))] = rng.choice((1, 3, 4))
    kinds = (
        bool,
        np.uint8,
        np.int8,
        np.uint16,
        np.int64,
        np.float16,
        np.float32,
        np.float64,
        ">u2",
        ">f4",
        complex,
        object,
    )
    scale = rng.choice((0.0, 0.5, 1.0, 1.01, 2.0, 255.0, 256.0, 65535.0, 1e30, -1.0, math.nan, math.inf))
    values = np.asarray(np.random.default_rng(rng.randrange(2**32)).random(shape))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # casts that overflow: the point
        return np.asarray(values * scale).astype(rng.choice(kinds))


def any_image(rng: random.Random, frame: np.ndarray):
    picture = Image.fromarray(frame)
    kind = rng.randrange(9)
    if kind == 0:
        return rng.choice(ANYTHING)
    if kind == 1:
        return any_array(rng)
    if kind == 2:
        array = any_array(rng)
        return array.tolist() if array.dtype == object or array.dtype.kind == "c" else torch.tensor(array.tolist())
    if kind == 3:
        return any_array(rng).tolist()
    if kind == 4:
        return damaged_file(rng, frame)
    if kind == 5:
        try:
            image = Image.open(io.BytesIO(damaged_file(rng, frame)))
        except Exception:  # what cannot be opened is no input of ours
            return picture
        if rng.random() < 0.3:
            image.close()
        return image
    if kind == 6:
        mode = rng.choice(("1", "L", "P", "LA", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV", "LAB", "I", "F"))
        return (picture.convert("RGBA") if mode == "RGBa" else picture).convert(mode)
    if kind == 7:
        size = rng.choice(((0, 5), (5, 0), (1, 1), (1, 300), (300, 1), (64, 1), (2, 3)))
        return Image.new(rng.choice(("RGB", "RGBA", "L", "I;16", "La")), size)
    return rng.choice(
        ("missing.png", "http://example.com/a.png", "data:image/png;base64,iVBORw0", "/", "a" * 5000, "\0")
    )


def any_text(rng: random.Random) -> str:
    pieces = (
        "open", " the drawer ", "\n", "\t", "  ", "</s>", "<s>", "<PAD>", "<unk>", "Յ", "황", "给", "🤖", "\0",
        "\ud83e",
        "In:", "Out:", QUESTION, "action should the robot take to", "{instruction}", "{", "%s", "\\n", "\u200b", "İ",
        "x" * 3000,
    )  # fmt: skip
    return "".join(rng.choice(pieces) for _ in range(rng.randint(0, 5)))


# One generator for each kind of call ----------------------------------------------------------------------------------


def images(rng: random.Random, given: Prediction) -> Callable:
    image = any_image(rng, given.frame)
    return lambda: np.asarray(load_image(image))


def instructions(rng: random.Random, given: Prediction) -> Callable:
    text = rng.choice((*ANYTHING, *[None] * 40))
    text = any_text(rng) if text is None else text

    def prompt_is_text():
        """Neither control nor action tokens, and a prompt handed over again stays what it is."""
        prompt = given.processor.format_prompt(text)
        ids = given.processor(prompt)["input_ids"][:, 1:]
        is_text = not bool(((ids < 3) | (ids >= 31744)).any())
        return is_text and given.processor.format_prompt(prompt) == prompt

    return prompt_is_text


def raw_calls(rng: random.Random, given: Prediction) -> Callable:
    image = any_image(rng, given.frame) if rng.random() < 0.6 else given.frame
    text = rng.choice((any_text(rng), "open the drawer", rng.choice(ANYTHING)))
    if rng.random() < 0.2:
        image, text = [image] * rng.randrange(3), [text] * rng.randrange(3)
    key = rng.choice(("robot", "robot", None, rng.choice(ANYTHING)))
    return lambda: given.model.predict_action(image, text, unnorm_key=key)


def published_calls(rng: random.Random, given: Prediction) -> Callable:
    inputs = dict(given.inputs)
    for _ in range(rng.randint(1, 2)):
        name = rng.choice(list(inputs))
        value = inputs[name]
        if not isinstance(value, torch.Tensor) or not value.numel():
            continue
        kind = rng.randrange(8)
        if kind == 0:
            inputs[name] = rng.choice(ANYTHING)
        elif kind == 1:
            inputs[name] = value.to(rng.choice((torch.bool, torch.uint8, torch.int32, torch.float16)))
        elif kind == 2:
            inputs[name] = value[rng.choice((0, slice(0), slice(None), None))]
        elif kind == 3:
            inputs[name] = rng.choice(
                (value.numpy(), value.tolist(), value.flip(0), value.to("meta"), value.to_sparse())
            )
        elif kind == 4:
            changed = value.clone().flatten()
            changed[rng.randrange(len(changed))] = rng.choice((0, -1, 2, 999, 31999, 32000, 32063, 2**31))
            inputs[name] = changed.view_as(value)
        elif kind == 5:
            changed = value.float().clone().flatten()
            changed[rng.randrange(len(changed))] = rng.choice((math.nan, math.inf, -math.inf, 1e30, 100.0))
            inputs[name] = changed.view_as(value)
        elif kind == 6:
            inputs[name] = torch.cat([value] * rng.choice((1, 2)), dim=rng.randrange(value.ndim))
        else:
            del inputs[name]
    return lambda: given.model.predict_action(**inputs, unnorm_key="robot")


def options(rng: random.Random, given: Prediction) -> Callable:
    names = (
        "do_sample", "temperature", "top_k", "top_p", "generator", "generation_config", "use_cache", "max_new_tokens",
        "max_length", "num_beams", "unorm_key", "seed", "return_dict", "constrained", "eos_token_id",
        "logits_processor",
    )  # fmt: skip
    chosen = {rng.choice(names): rng.choice((*ANYTHING, 7, 0.9, 5)) for _ in range(rng.randint(1, 3))}
    chosen.pop("return_dict", None)
    return lambda: given.model.predict_action(**given.inputs, **{"unnorm_key": "robot", **chosen})


KINDS = {images: 400, instructions: 300, raw_calls: 250, published_calls: 250, options: 200}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_right_result_or_a_documented_error(kind, prediction, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    accepted, failures = 0, []
    for seed in range(KINDS[kind]):
        call = kind(random.Random(f"{kind.__name__} {seed}"), prediction)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                result = call()
            except DOCUMENTED as error:
                if isinstance(error, FROM_DEEP_INSIDE) or len(str(error)) < 20:
                    failures.append(f"{seed}: {error!r}")
                continue
            except Exception as error:  # the errors that this test is there to find
                failures.append(f"{seed}: {error!r}")
                continue
        accepted += 1
        if not is_right(kind, result):
            failures.append(f"{seed}: {result!r}")
    assert not failures, "\n".join(failures)
    assert 0.03 < accepted / KINDS[kind] < 0.97  # neither everything refused nor nothing


def is_right(kind: Callable, result) -> bool:
    if kind is instructions:
        return bool(result)
    if kind is images:
        return result.dtype == np.uint8 and result.ndim == 3 and result.shape[-1] == 3 and result.size > 0
    return result.dtype == np.float64 and result.shape[-1] == 7 and bool((np.abs(result) <= 1).all())  # False for NaN
