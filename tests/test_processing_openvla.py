"""Images in every form a camera driver delivers, prompts, batches."""

import io
import json
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import TINY, golden_image
from transformers import AutoImageProcessor

from openvla import OpenVLAConfig, OpenVLAImageProcessor, OpenVLAProcessor, load_image
from openvla.data.images import decode_image
from openvla.pixels_openvla import as_image_list
from openvla.prompts_openvla import PROMPT_TEMPLATES, has_words, plain_text, read_instruction


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return golden_image(1).convert("RGB")


def pixels(image) -> np.ndarray:
    return np.asarray(load_image(image))


# Images


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_arrays_and_tensors(photo, dtype, channels_first, library):
    array = np.asarray(photo)
    expected = array
    array = {np.uint16: array.astype(np.uint16) * 257, np.uint8: array}.get(dtype, (array / 255).astype(dtype))
    array = array.transpose(2, 0, 1) if channels_first else array
    image = torch.from_numpy(array.copy()) if library == "torch" else array
    np.testing.assert_array_equal(pixels(image), expected)


def test_floats_up_to_255(photo):
    np.testing.assert_array_equal(pixels(np.asarray(photo, dtype=np.float32)), np.asarray(photo))


def test_bfloat16_tensor(photo):
    tensor = torch.from_numpy(np.array(photo)).permute(2, 0, 1).to(torch.bfloat16)
    assert np.abs(pixels(tensor).astype(int) - np.asarray(photo)).max() <= 1


def test_paths(photo, tmp_path):
    photo.save(tmp_path / "frame.png")
    for path in (tmp_path / "frame.png", str(tmp_path / "frame.png")):
        np.testing.assert_array_equal(pixels(path), np.asarray(photo))
    with pytest.raises(FileNotFoundError, match="missing.png"):
        load_image(tmp_path / "missing.png")
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(ValueError, match="text.png' as an image: it is no PNG, no JPEG"):
        load_image(tmp_path / "text.png")
    (tmp_path / "empty.png").touch()
    with pytest.raises(ValueError, match=r"empty.png' as an image: it is empty \(0 bytes\)"):
        load_image(tmp_path / "empty.png")


def test_truncated_file(photo, tmp_path):
    photo.save(tmp_path / "frame.png")
    data = (tmp_path / "frame.png").read_bytes()
    (tmp_path / "half.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="half.png"):
        load_image(tmp_path / "half.png")


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_a_film_is_no_frame(photo, tmp_path, form):
    """The first of its frames is the oldest."""
    more = {"save_all": True, "append_images": [photo.rotate(90), photo.rotate(180)]}
    file = tmp_path / f"film.{form.lower()}"
    photo.save(file, form, **more)
    for given in (file, file.read_bytes()):
        with pytest.raises(ValueError, match="holds 3 frames, give the one to act on"):
            load_image(given)
    with Image.open(file) as film:
        film.seek(2)  # one that was chosen
        seen = np.asarray(film.convert("RGB"))
        np.testing.assert_array_equal(np.asarray(load_image(film)), seen)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(photo, tmp_path, orientation):
    turned = {
        1: [],
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }[orientation]
    stored = photo
    for operation in turned:
        stored = stored.transpose(operation)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "frame.png", exif=exif)
    np.testing.assert_array_equal(pixels(tmp_path / "frame.png"), np.asarray(photo))


def test_grayscale(photo):
    gray = photo.convert("L")
    expected = np.repeat(np.asarray(gray)[..., None], 3, axis=2)
    for image in (gray, np.asarray(gray), np.asarray(gray)[..., None], np.asarray(gray)[None], gray.convert("LA")):
        np.testing.assert_array_equal(pixels(image), expected)


def test_transparency_is_composited_over_white(photo):
    rgba = np.dstack([np.asarray(photo), np.full(photo.size[::-1], 128, dtype=np.uint8)])
    rgba[:10, :10, 3] = 0  # invisible pixels must not show the color they hide
    expected = np.asarray(photo) * (128 / 255) + 255 * (127 / 255)
    expected[:10, :10] = 255
    for image in (Image.fromarray(rgba), rgba, torch.from_numpy(rgba).permute(2, 0, 1)):
        assert np.abs(pixels(image) - expected).max() <= 1
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30] + [0] * 765)
    palette.info["transparency"] = 0
    assert (pixels(palette) == 255).all()


def test_sixteen_bit(tmp_path):
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    expected = np.repeat(np.rint(values / 257)[..., None], 3, axis=2).astype(np.uint8)
    Image.fromarray(values).save(tmp_path / "depth.png")
    for image in (values, Image.fromarray(values), tmp_path / "depth.png", values.astype(np.int32)):
        np.testing.assert_array_equal(pixels(image), expected)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.full((8, 8, 3), np.nan), "NaN"),
        (np.full((8, 8, 3), -1.0), "expected \\[0, 1\\]"),
        (np.full((8, 8, 3), 300.0), "expected \\[0, 1\\]"),
        (np.zeros((8, 8, 5), dtype=np.uint8), "channel axis"),
        (np.zeros((8,), dtype=np.uint8), "2 or 3 dimensions"),
        (np.zeros((0, 8, 3), dtype=np.uint8), "empty"),
        (np.zeros((8, 8, 3), dtype=np.complex64), "dtype"),
        (np.full((8, 8, 3), -4, dtype=np.int64), "expected 0 to 255"),
        (np.zeros((2, 200, 3), dtype=np.uint8), "strip"),
        (torch.zeros(3, 8, 8, device="meta"), "meta"),
        (np.array(["frame.png"]), "2 or 3 dimensions"),
        (Image.new("RGB", (0, 5)), "empty"),
        ({"full_image": None}, "dict"),
        (42, "int"),
        (None, "NoneType"),
    ],
)
def test_unreadable_images(image, message):
    with pytest.raises(ValueError, match=message):
        load_image(image)


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "PA", "LA", "La", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "I", "F"]
)
def test_modes(photo, mode):
    source = photo.convert({"RGBa": "RGBA", "La": "LA"}.get(mode, "RGB"))
    found = pixels(source.convert(mode))
    gray = mode in ("1", "L", "LA", "La", "I", "F")
    expected = np.asarray((photo.convert("L") if gray else photo).convert("RGB")).astype(int)
    assert np.abs(found - expected).mean() < {"1": 128, "P": 64, "PA": 64}.get(mode, 3)


def test_files_that_break_when_they_are_read(photo):
    """Pillow reads pixels when they are first looked at: what is wrong with a file shows only then."""
    for format in ("PNG", "JPEG"):
        file = io.BytesIO()
        photo.save(file, format)
        data = file.getvalue()
        np.testing.assert_array_equal(pixels(data), pixels(Image.open(io.BytesIO(data))))
        for half in (data[: len(data) // 2], bytearray(data[: len(data) // 2])):
            with pytest.raises(ValueError, match="Cannot read"):
                load_image(half)
        with pytest.raises(ValueError, match="Cannot read the image"):
            load_image(Image.open(io.BytesIO(data[: len(data) // 2])))
        closed, lost = Image.open(io.BytesIO(data)), io.BytesIO(data)
        closed.close()
        without_stream = Image.open(lost)
        lost.close()
        for image in (closed, without_stream):
            with pytest.raises(ValueError, match="Cannot read the image"):
                load_image(image)


def jpeg(image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"restart_marker_blocks": 2}, {"optimize": True}], ids=str)
def test_a_damaged_jpeg_is_no_picture(photo, options):
    """libjpeg makes gray what is missing of it, and says nothing."""
    data = jpeg(photo.resize((128, 96)), quality=95, **options)
    half = len(data) // 2
    damaged = {
        "lost": data[:half] + data[half + half // 4 :],
        "other bytes": data[:half] + b"\xff\xfe" * 40 + data[half + 80 :],
        "no end": data[: half - 1] + b"\xff\xd9",
    }
    for given in damaged.values():
        assert Image.open(io.BytesIO(given)).load() is not None
        with pytest.raises(ValueError, match="it is damaged"):
            load_image(given)


def test_twice_the_same_part_of_a_jpeg_is_damage(photo):
    data = jpeg(photo.resize((128, 96)), restart_marker_blocks=2)
    if b"\xff\xdd" not in data:
        pytest.skip("Pillow before 10.2 writes no restarts")
    first, second = (data.index(mark, data.index(b"\xff\xda")) for mark in (b"\xff\xd1", b"\xff\xd3"))
    for given in (data[:second] + data[first:], data[:first] + data[second:]):
        with pytest.raises(ValueError, match="missing or doubled"):
            load_image(given)


@pytest.mark.parametrize("size", [(2, 2), (17, 9), (128, 96)])
@pytest.mark.parametrize(
    "options", [{}, {"subsampling": 0}, {"progressive": True}, {"restart_marker_blocks": 1}], ids=str
)
def test_a_jpeg_as_cameras_write_it_is_read(photo, size, options):
    for image in (photo.resize(size), Image.new("RGB", size, (128, 128, 128)), photo.resize(size).convert("L")):
        data = jpeg(image, **options)
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        for given in (data, data + bytes(100), data[:-2] + bytes(20) + data[-2:], data[:-2] + b"\xff" + data[-2:]):
            np.testing.assert_array_equal(pixels(given), expected)


def test_nested_lists(photo):
    """What a JSON client sends."""
    small = np.asarray(photo.resize((6, 4)))
    for array in (small, small.transpose(2, 0, 1), small / 255):
        np.testing.assert_array_equal(pixels(array.tolist()), small)
    assert len(as_image_list(np.stack([small] * 3).tolist())) == 3
    deep = []
    for _ in range(5000):
        deep = [deep]
    for broken, message in (([[1, 2], [3]], "rows of one length"), ([1, 2, 3], "2 or 3 dimensions"), (deep, "nested")):
        with pytest.raises(ValueError, match=message):
            [load_image(image) for image in as_image_list(broken)]


@pytest.mark.parametrize(
    "array",
    [
        np.eye(8, dtype=np.float32),  # black and white, or all but black?
        np.ones((8, 8, 3)),
        np.full((8, 8, 3), 1.02),  # [0, 1] after a resize that overshoots, or all but black?
        np.full((8, 8, 3), 200, dtype=np.uint16),  # 8-bit levels, or all but black?
        np.full((8, 8, 3), 200, dtype=">u2"),
        np.full((8, 8, 3), 200, dtype=np.int64) + 75,  # 8-bit levels that were made brighter
        np.full((8, 8, 3), 275, dtype=np.uint16),
        np.full((8, 8, 3), 4095, dtype=np.uint16),  # of a camera's 12 bits
    ],
)
def test_pixels_that_may_be_bright_or_black_are_refused(array):
    for image in (array, array.tolist()) if array.dtype.kind == "f" else (array,):
        with pytest.raises(ValueError, match="uint8"):
            load_image(image)


def test_dark_frames(photo):
    """A frame stays as dark as it is, in every type."""
    dark = np.asarray(photo) // 10
    for array in (
        dark,
        dark.astype(np.float32),
        dark / 255,
        (dark / 255).astype(np.float16),
        dark.astype(np.uint16) * 257,
    ):
        np.testing.assert_array_equal(pixels(array), dark)
    assert not pixels(np.zeros((8, 8, 3))).any() and not pixels(np.zeros((8, 8), np.uint16)).any()


def test_training_reads_files_as_prediction_does(photo):
    decode_image = pytest.importorskip("openvla.data.images", reason="needs the [data] extra").decode_image
    exif = Image.Exif()
    exif[0x0112] = 6
    transparent = photo.convert("RGBA")
    transparent.putalpha(photo.convert("L"))
    palette = photo.convert("P")
    for image, format, options in (
        (photo, "PNG", {"exif": exif}),
        (transparent, "PNG", {}),
        (palette, "PNG", {"transparency": 3}),
        (photo.convert("L"), "PNG", {}),
    ):
        file = io.BytesIO()
        image.save(file, format, **options)
        np.testing.assert_array_equal(decode_image(file.getvalue()), pixels(file.getvalue()))
    upright, turned = io.BytesIO(), io.BytesIO()
    photo.save(upright, "JPEG")
    photo.save(turned, "JPEG", exif=exif)
    expected = np.rot90(decode_image(upright.getvalue()), -1)  # 6: turned by 90 degrees counterclockwise
    np.testing.assert_array_equal(decode_image(turned.getvalue()), expected)
    assert pixels(turned.getvalue()).shape == expected.shape


# The image processor


def test_batches_equal_single_images(tiny_processor, photo):
    images = [photo, golden_image(2), golden_image(3)]
    one_by_one = [tiny_processor.image_processor(image, return_tensors="pt")["pixel_values"] for image in images]
    together = tiny_processor.image_processor(images, return_tensors="pt")["pixel_values"]
    assert together.dtype == torch.float32
    torch.testing.assert_close(together, torch.cat(one_by_one), rtol=0, atol=0)
    stacked = np.stack([np.asarray(photo)] * 2)
    assert tiny_processor.image_processor(stacked, return_tensors="np")["pixel_values"].shape[0] == 2


def test_reads_the_published_layout_and_writes_todays(tiny_checkpoint, tiny_processor, tmp_path):
    published = json.loads((tiny_checkpoint.folder / "preprocessor_config.json").read_text())
    assert published["image_processor_type"] == "PrismaticImageProcessor"
    tiny_processor.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "processor_config.json").read_text())
    assert written["processor_class"] == "OpenVLAProcessor"
    fields = written["image_processor"]
    assert fields["image_processor_type"] == "OpenVLAImageProcessor"
    assert not any(name.startswith("tvf_") for name in fields)
    for name in ("input_sizes", "means", "stds", "interpolations", "image_resize_strategy"):
        assert fields[name] == published[name]
    again = OpenVLAProcessor.from_pretrained(tmp_path)
    assert again.prompt_template == tiny_processor.prompt_template
    for case in tiny_checkpoint.cases[:3]:
        inputs = [processor(case["prompt"], golden_image(case["image"])) for processor in (tiny_processor, again)]
        assert inputs[0]["input_ids"].tolist() == inputs[1]["input_ids"].tolist() == [case["input_ids"]]
        assert torch.equal(inputs[0]["pixel_values"], inputs[1]["pixel_values"])


def test_each_tower_has_its_own_size_and_interpolation(photo):
    processor = OpenVLAImageProcessor(
        use_fused_vision_backbone=True,
        image_resize_strategy="resize-crop",
        input_sizes=[[3, 56, 56], [3, 56, 56]],
        interpolations=["bicubic", "bilinear"],
        means=[[0.0] * 3] * 2,
        stds=[[1.0] * 3] * 2,
    )
    pixel_values = processor(photo, return_tensors="np")["pixel_values"]
    assert pixel_values.shape == (1, 6, 56, 56)
    assert not np.array_equal(pixel_values[:, :3], pixel_values[:, 3:])


def test_image_processor_errors():
    with pytest.raises(ValueError, match="Did you mean 'letterbox'"):
        OpenVLAImageProcessor(image_resize_strategy="letter-box")
    with pytest.raises(ValueError, match="one per tower"):
        OpenVLAImageProcessor(input_sizes=[[3, 8, 8]] * 2, means=[[0.5] * 3])
    with pytest.raises(ValueError, match=r"input_sizes=\[\[3, 8.5, 8\]\]: expected whole numbers"):
        OpenVLAImageProcessor(input_sizes=[[3, 8.5, 8]])
    of_floats = OpenVLAImageProcessor(input_sizes=[[3.0, 8.0, 8.0]])  # Pillow takes no such size
    assert of_floats(golden_image(0))["pixel_values"].shape == (1, 3, 8, 8)
    with pytest.raises(ValueError, match="bicubic"):
        OpenVLAImageProcessor(interpolations=["cubic"])
    with pytest.raises(ValueError, match="empty"):
        OpenVLAImageProcessor()([])


# Prompts


def test_prompt_form_comes_from_the_config(tmp_path):
    assert TINY[0].processor().format_prompt("Open the Drawer") == (
        "In: What action should the robot take to open the drawer?\nOut:"
    )
    chat = TINY[1].processor().format_prompt("Open the Drawer")
    assert chat.startswith("A chat between a curious user") and chat.endswith("take to open the drawer? ASSISTANT:")
    # A folder whose name says v01 is still told by its config.
    folder = tmp_path / "openvla-v01-7b"
    folder.mkdir()
    for file in TINY[0].folder.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    assert OpenVLAProcessor.from_pretrained(folder).format_prompt("stop").startswith("In: ")


@pytest.mark.parametrize("other", TINY, ids=lambda checkpoint: checkpoint.name)
def test_one_instruction_has_one_prompt(tiny_processor, other):
    """However it is typed, and also where a complete prompt, of any checkpoint, is handed over."""
    prompt = tiny_processor.format_prompt("open the drawer")
    complete = other.processor().format_prompt("open the drawer")
    for text in (
        " open the drawer", "open the drawer ", "Open  the\tDrawer\n", "open the drawer\0\0", "open\u00a0the drawer",
        "open\u3000the\u2009drawer", "open\x07the\x1fdrawer\x7f", "\ufeffo\u200bpen the dra\u00adwer\u2060",
        "open\u2800the drawer", "ｏｐｅｎ ｔｈｅ ＤＲＡＷＥＲ",
        complete.replace(" ", "\u00a0"), complete.replace("open", "o\u200dpen"),
        prompt, complete, complete + " ", complete.upper(), complete.replace("\n", "\\n"), complete.replace("\n", " "),
        "What action should the robot take to open the drawer?", complete.replace("open the drawer", complete),
    ):  # fmt: skip
        assert tiny_processor.format_prompt(text) == prompt, text
    behind = complete.partition("robot take to ")[2]
    for part in (complete[:-4], complete[4:], complete + complete, complete + "</s>", behind, behind + " "):
        with pytest.raises(ValueError, match="part of a prompt"):
            tiny_processor.format_prompt(part)
    with pytest.raises(ValueError, match="empty"):
        tiny_processor.format_prompt(complete.replace("open the drawer", " "))


@pytest.mark.parametrize(
    ("seen", "forms"),
    [
        ("öffne die tür", ("o\u0308ffne die tu\u0308r", "ÖFFNE DIE TÜR", "O\u0308ffne die Tu\u0308R")),
        ("ガラス", ("ｶﾞﾗｽ", "カ\u3099ラス", "ガ\ufe00ラス")),
        ("서랍을 열어", ("\u1109\u1165\u1105\u1161\u11b8\u110b\u1173\u11af 열어", "서랍을\u3164 열어")),
        ("i\u0307stanbul", ("İstanbul", "I\u0307stanbul")),
        ("5 m² ½ … ’s ﬁne 90º", ()),  # whose compatible forms would be other words: 5 m2, 1⁄2, 90o
    ],
)
def test_what_looks_the_same_is_the_same(seen, forms, tiny_processor):
    for form in (seen, *forms):
        assert plain_text(form) == plain_text(plain_text(form)) == seen
        assert read_instruction(form) == seen
        assert tiny_processor.prompt_ids(form) == tiny_processor.prompt_ids(seen)


def test_what_has_no_words(tiny_processor):
    """For a reader, whose steps without words are left out, as for a prompt."""
    for empty in ("", " \0", "\u200b", "\x07", "?!", "\u3164", "\u2800 \u2800", "\ufffd\ufffd", "\ufe0f", "\U000e0041"):
        assert not has_words(empty)
        with pytest.raises(ValueError, match="empty"):
            tiny_processor.format_prompt(empty)
        assert tiny_processor.prompt_ids(empty, allow_empty=True) == tiny_processor.prompt_ids("", allow_empty=True)
    assert all(map(has_words, ("1", "↑", "🤖", "打开", "\u200bgo")))


def other_tokenizer(folder, changes: dict, settings: dict | None = None) -> Path:
    """A copy of a checkpoint's JSON files with other entries in its tokenizer."""
    folder.mkdir()
    for file in TINY[0].folder.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    for name, entries in (("tokenizer.json", changes), ("tokenizer_config.json", settings or {})):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | entries))
    return folder


def begins_with(*tokens: str) -> dict:
    special = [{"SpecialToken": {"id": token, "type_id": 0}} for token in tokens]
    ids = {"<s>": 1, "</s>": 2, "<unk>": 0}
    return {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [*special, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {
                token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in set(tokens) or {"<s>"}
            },
        }
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"post_processor": None}, r"holds the token that starts a sequence \(1\) 0 times"),
        (begins_with("<s>", "<s>"), r"starts with \[1, 1, \d+\] .*2 times"),
        (begins_with("</s>", "<s>"), r"starts with \[2, 1, "),
        (begins_with("<unk>"), r"starts with \[0, "),
    ],
    ids=["without", "twice", "end", "unknown"],
)
def test_tokenizers_whose_prompts_begin_in_another_way(changes, message, tmp_path):
    settings = {"add_bos_token": None} if changes == {"post_processor": None} else {}
    folder = other_tokenizer(tmp_path / "model", changes, settings)
    with pytest.raises(ValueError, match=f"(?s)tokenizer.json.*{message}"):
        OpenVLAProcessor.from_pretrained(folder)


def test_prompt_forms_that_start_a_sequence_twice(tiny_checkpoint, tiny_processor):
    """The tokenizer begins with <s> by itself."""
    config = OpenVLAConfig.from_pretrained(tiny_checkpoint.folder, timm_model_kwargs=tiny_checkpoint.timm_model_kwargs)
    for template, fits in (("[INST] {instruction} [/INST]", True), ("<s>[INST] {instruction} [/INST]", False)):
        own = OpenVLAProcessor(tiny_processor.image_processor, tiny_processor.tokenizer, prompt_template=template)
        if fits:
            own.check_fits(config)
        else:
            with pytest.raises(ValueError, match="(?s)prompt_template.* 2 times"):
                own.check_fits(config)


def test_a_processor_made_by_hand_asks_as_the_model_was_trained(tiny_checkpoint, tiny_processor, tmp_path):
    """Of v01 in the chat form; a form of its own stays."""
    own = OpenVLAProcessor(tiny_processor.image_processor, tiny_processor.tokenizer)
    chosen = OpenVLAProcessor(tiny_processor.image_processor, tiny_processor.tokenizer, "do {instruction}")
    for processor in (own, chosen):
        processor.check_fits(OpenVLAConfig.from_pretrained(
            tiny_checkpoint.folder, timm_model_kwargs=tiny_checkpoint.timm_model_kwargs, llm_backbone_id="vicuna-v15-7b"
        ))  # fmt: skip
    assert own.format_prompt("stop") == PROMPT_TEMPLATES["openvla-v01"].format(instruction="stop")
    assert chosen.format_prompt("stop") == "do stop"
    # One for two models asks each in its own form.
    model, of_v01 = tiny_checkpoint.load(), tiny_checkpoint.load()
    model.config.llm_backbone_id, of_v01.config.llm_backbone_id = "llama2-7b-pure", "vicuna-v15-7b"
    model.processor = of_v01.processor = own
    for _ in range(2):
        for asked, form in ((model, "openvla"), (of_v01, "openvla-v01")):
            assert asked.processor.format_prompt("stop") == PROMPT_TEMPLATES[form].format(instruction="stop")
    chosen.save_pretrained(tmp_path / "chosen")
    own.save_pretrained(tmp_path / "own")
    assert all("_form_of_model" not in file.read_text() for file in tmp_path.glob("*/processor_config.json"))


@pytest.mark.parametrize("bins", [64, 256, 512])
def test_action_tokens_are_those_of_the_model(bins, tmp_path, photo):
    """Characters that stand for actions are text: as many as the config says, no more and no less."""
    folder = other_tokenizer(tmp_path / "model", {})
    content = json.loads((folder / "config.json").read_text())
    content |= {"n_action_bins": bins, "timm_model_kwargs": TINY[0].timm_model_kwargs}
    (folder / "config.json").write_text(json.dumps(content))
    processor = OpenVLAProcessor.from_pretrained(folder)
    for token_id in (31999, 32000 - bins, 32000 - bins - 1, 31400):
        token = processor.tokenizer.convert_ids_to_tokens(token_id)
        ids = processor(f"give {token} back", photo)["input_ids"][0].tolist()
        assert (token_id in ids) == (token_id < 32000 - bins), (bins, token)
    by_hand = OpenVLAProcessor(processor.image_processor, processor.tokenizer)
    by_hand.check_fits(OpenVLAConfig.from_dict(content))
    assert by_hand.n_action_tokens == bins
    processor.save_pretrained(tmp_path / "saved")
    assert "n_action_tokens" not in (tmp_path / "saved" / "processor_config.json").read_text()


@pytest.mark.filterwarnings("error::DeprecationWarning")
def test_a_complete_prompt_is_read_on_later_pythons(tiny_processor):
    """Python 3.14 raises an error where a comparison that is not implemented is taken for true or false."""
    prompt = tiny_processor.format_prompt("open the drawer")
    assert tiny_processor.format_prompt(prompt) == prompt


def test_prompt_forms_of_ones_own(tiny_processor):
    def prompt(template: str, text: str) -> str:
        own = OpenVLAProcessor(tiny_processor.image_processor, tiny_processor.tokenizer, prompt_template=template)
        return own.format_prompt(own.format_prompt(text) if len(template) > 40 else text)

    assert prompt("do {instruction}", "do the dishes") == "do do the dishes"
    long = "You are a robot with one arm. Your task: {instruction}. Act:"
    assert prompt(long, "do the dishes") == long.replace("{instruction}", "do the dishes")
    with pytest.raises(ValueError, match="special token"):
        prompt("<s>[INST] {instruction} [/INST]", "stop</s>")


def test_words_stay_text(tiny_processor, photo):
    """Neither the name of a special token nor a character of an action token becomes that token."""
    tokenizer, first = tiny_processor.tokenizer, tiny_processor.tokenizer.vocab_size - 256
    actions = "".join(tokenizer.convert_ids_to_tokens([first, first + 9, first + 255]))
    texts = ["stop </s> now", "<s>stop<unk>", "say <pad>", f"give {actions} back", "open the drawer"]
    for text in texts:
        prompt = tiny_processor.format_prompt(text)
        ids = tiny_processor(prompt, photo)["input_ids"][0].tolist()
        assert ids[0] == 1 and all(3 <= token < first for token in ids[1:])
        assert tokenizer.decode(ids, skip_special_tokens=True) == prompt
        assert tiny_processor.prompt_ids(text) == [*ids, 29871]
    prompts = tiny_processor.format_prompt(texts)
    batch = tiny_processor(prompts, padding_side="left")
    for row, prompt in enumerate(prompts):
        mask = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row][mask].tolist() == tiny_processor(prompt)["input_ids"][0].tolist()
        assert bool(mask[-1])
    for prompt in (prompts[3], prompts[4]):  # of which one holds characters of action tokens
        with pytest.warns(UserWarning, match=r"cut to 8 tokens \(truncation\)"):
            short = tiny_processor(prompt, truncation=True, max_length=8, padding="max_length")
        assert short["input_ids"].shape == (1, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny_processor(prompts[0], truncation=True)
    # Who wants tokens says so; a complete training text of the original has them at its end.
    assert tiny_processor("stop</s>", split_special_tokens=False)["input_ids"][0, -1] == 2
    ids = tiny_processor([f"{prompts[4]} {actions}</s>", prompts[0]])["input_ids"]
    assert [first, first + 9, first + 255, 2] in ids[0].unfold(0, 4, 1).tolist() and 2 not in ids[1]


def test_prompts_that_are_none(tiny_processor, photo):
    """A bare instruction, one of another model's prompts, one that says nothing: a model acts on all of them."""
    prompt = tiny_processor.format_prompt("stop")
    other = next(form for form in PROMPT_TEMPLATES.values() if form != tiny_processor.prompt_template)
    for text in ("stop", other.format(instruction="stop"), prompt.replace("stop", " "), prompt[:-4], [prompt, "stop"]):
        with pytest.warns(UserWarning, match="is no prompt of this model.*format_prompt"):
            tiny_processor(text, [photo] * (len(text) if isinstance(text, list) else 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for text in (prompt, prompt + " ", prompt + " \u9ec4</s>"):
            tiny_processor(text, photo)
        tiny_processor("stop")
        for form in ("Do {instruction}", "Do {instruction}, please {instruction}!", "{instruction}"):
            own = OpenVLAProcessor(tiny_processor.image_processor, tiny_processor.tokenizer, prompt_template=form)
            own(own.format_prompt("stop"), photo)


def test_text_that_is_no_text(tiny_processor):
    for text in ("open \ud800", "\udcff"):
        for call in (tiny_processor.format_prompt, tiny_processor, tiny_processor.prompt_ids):
            with pytest.raises(ValueError, match="not valid Unicode") as caught:
                call(text)
            assert not isinstance(caught.value, UnicodeError)
    with pytest.raises(ValueError, match="got bytes"):
        tiny_processor.format_prompt(b"open the drawer")


def test_one_processor_in_many_threads(tiny_processor, photo):
    """Calls that pad, cut and read special tokens in turn, on one tokenizer; and a file that nobody has read yet."""
    file = io.BytesIO()
    photo.save(file, "PNG")

    def call(index: int, image=photo) -> list:
        texts = [tiny_processor.format_prompt("open the drawer " * (index % 5 + 1)), "stop"][: index % 2 + 1]
        options = ({"padding": "max_length", "max_length": 80}, {"truncation": True, "max_length": 9}, {})[index % 3]
        inputs = tiny_processor(texts, [image] * len(texts), split_special_tokens=(True, False)[index % 2], **options)
        return [inputs["input_ids"].tolist(), float(inputs["pixel_values"].sum())]

    expected = [call(index) for index in range(30)]
    unread = Image.open(file)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(call, range(30), [unread] * 30)) == expected


def test_format_prompt_errors(tiny_processor):
    for empty in ("", "  \n", "\u200b", "\ufeff\u202e", "\x07", "?!"):
        with pytest.raises(ValueError, match="empty"):
            tiny_processor.format_prompt(empty)
    with pytest.raises(ValueError, match="int"):
        tiny_processor.format_prompt(3)
    with pytest.raises(ValueError, match="instruction"):
        OpenVLAProcessor(tiny_processor.image_processor, tiny_processor.tokenizer, prompt_template="do it")


def test_training_strings(tiny_checkpoint, tiny_processor):
    golden, summary = tiny_checkpoint.arrays("train_batch.npz"), tiny_checkpoint.json("train.json")
    inputs = tiny_processor(text=summary["texts"], images=[golden_image(index) for index in summary["images"]])
    np.testing.assert_array_equal(inputs["input_ids"].numpy(), golden["input_ids"])
    np.testing.assert_array_equal(inputs["attention_mask"].numpy(), golden["attention_mask"])
    np.testing.assert_array_equal(inputs["pixel_values"].numpy(), golden["pixel_values"])


def test_published_order_and_keywords(tiny_processor, photo):
    prompt = tiny_processor.format_prompt("open the drawer")
    reference = tiny_processor(prompt, photo)
    for inputs in (tiny_processor(text=prompt, images=photo), tiny_processor(photo, prompt)):
        assert torch.equal(inputs["input_ids"], reference["input_ids"])
        assert torch.equal(inputs["pixel_values"], reference["pixel_values"])
    assert set(tiny_processor(prompt)) == {"input_ids", "attention_mask"}
    assert set(tiny_processor(images=photo)) == {"pixel_values"}
    assert reference.to(dtype=torch.bfloat16)["pixel_values"].dtype == torch.bfloat16


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_are_padded(tiny_processor, photo, side):
    prompts = [tiny_processor.format_prompt(text) for text in ("open the drawer", "push")]
    inputs = tiny_processor(prompts, [photo, photo], padding_side=side)
    for row, prompt in enumerate(prompts):
        mask = inputs["attention_mask"][row].bool()
        assert inputs["input_ids"][row][mask].tolist() == tiny_processor(prompt)["input_ids"][0].tolist()
        assert bool(mask[-1 if side == "left" else 0])


def test_a_prompt_is_one_text(tiny_processor, photo):
    for options in ({"text_pair": "drawer"}, {"text_kwargs": {"text_pair": "drawer"}}):
        with pytest.raises(ValueError, match="text_pair: a prompt is one text"):
            tiny_processor("open", photo, **options)


def test_count_mismatch(tiny_processor, photo):
    with pytest.raises(ValueError, match="2 prompt.* 1 image"):
        tiny_processor(["a", "b"], [photo])
    with pytest.raises(ValueError, match="give text, images or both"):
        tiny_processor()


def test_empty_token(tiny_processor):
    assert tiny_processor.empty_token_id == 29871


@pytest.mark.parametrize(
    "options",
    [{"center_crop": 0.5}, {"resize_filter": "lanczos3"}, {"jpeg_quality": 95}, {"means": [[0.5] * 3]}],
    ids=lambda options: next(iter(options)),
)
def test_what_a_model_was_trained_to_see_is_no_option_of_a_call(options):
    """It was ignored: other pixels than were asked for."""
    (name,) = options
    processor, picture = TINY[1].processor(), golden_image(0)
    assert processor.image_processor(picture, **{name: getattr(processor.image_processor, name)})
    if name == "means":
        options = {"means": [[0.1] * 3]}
    for call in (processor.image_processor, lambda image, **kwargs: processor("Open.", image, **kwargs)):
        with pytest.raises(ValueError, match=f"{name}=.*no option of a call.*from_pretrained"):
            call(picture, **options)
        with pytest.raises(ValueError, match="size=.*here it is input_sizes"):
            call(picture, size={"height": 8, "width": 8})
    if name != "means":
        loaded = OpenVLAProcessor.from_pretrained(TINY[1].folder, **options)
        assert getattr(loaded.image_processor, name) == options[name]


def test_fields_that_are_given_are_checked():
    for name, value in (("center_crop", 5), ("resize_filter", "nope"), ("jpeg_quality", 0)):
        with pytest.raises(ValueError, match=f"{name}="):
            OpenVLAProcessor.from_pretrained(TINY[1].folder, **{name: value})


@pytest.mark.parametrize("given", [{"torch_dtype": torch.bfloat16}, {"dtype": torch.float32}])
def test_options_of_a_model_do_not_keep_a_processor_from_being_saved(given, tmp_path):
    TINY[1].processor().save_pretrained(tmp_path / "own")
    OpenVLAProcessor.from_pretrained(tmp_path / "own", **given).save_pretrained(tmp_path / "again")
    for file in (tmp_path / "own").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_an_image_processor_that_is_saved_by_itself_counts(tmp_path):
    """In the published layout as well as in today's, where processor_config.json is looked at first."""
    TINY[1].processor().save_pretrained(tmp_path)
    for crop in (0.9, None):
        OpenVLAImageProcessor.from_pretrained(tmp_path, center_crop=crop).save_pretrained(tmp_path)
        for load in (OpenVLAImageProcessor, AutoImageProcessor):
            assert load.from_pretrained(tmp_path).center_crop == crop
        assert OpenVLAProcessor.from_pretrained(tmp_path).image_processor.center_crop == crop


@pytest.mark.parametrize(
    "given, message",
    [
        ({"centre_crop": 0.9}, "centre_crop is no field of the image processor. Did you mean 'center_crop'"),
        ({"prompt_templat": "{instruction}"}, "Did you mean 'prompt_template'"),
        ({"size": 384}, "size=384: here it is input_sizes"),
        ({"do_center_crop": False}, "do_center_crop=False: here it is center_crop"),
    ],
)
def test_a_field_that_is_misspelled(given, message, tmp_path):
    """It was left out silently, and the model shown other pixels than it was trained with."""
    for kind in (OpenVLAProcessor, OpenVLAImageProcessor):
        with pytest.raises(ValueError, match=message):
            kind.from_pretrained(ROOT, **given)
    if "centre_crop" in given:
        OpenVLAProcessor.from_pretrained(ROOT).save_pretrained(tmp_path)
        file = tmp_path / "processor_config.json"
        content = json.loads(file.read_text())
        file.write_text(json.dumps(content | {"image_processor": content["image_processor"] | given}))
        with pytest.raises(ValueError, match=message):
            OpenVLAProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize("colour_type, channels", [(2, 3), (6, 4), (4, 2)])
def test_files_of_16_bits_are_as_dark_as_arrays(colour_type, channels):
    """Pillow takes the upper half of each number: of 12 bits of a camera it made a nearly black picture."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    def png(level: int) -> bytes:
        row = b"\0" + struct.pack(f">{channels}H", *[*[level] * (channels - 1), level if channels == 3 else 65535]) * 4
        header = struct.pack(">IIBBBBB", 4, 4, 16, colour_type, 0, 0, 0)
        parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(row * 4)), chunk(b"IEND", b""))
        return b"\x89PNG\r\n\x1a\n" + b"".join(parts)

    for level in (0, 200, 4095):
        for image in (png(level), Image.open(io.BytesIO(png(level)))):
            with pytest.raises(ValueError, match="16 bits stay below 4096 of 65535"):
                load_image(image)
        with pytest.raises(ValueError, match="16 bits stay below 4096 of 65535"):
            decode_image(png(level))
    assert load_image(png(40000)).getpixel((0, 0)) == (156, 156, 156)
