"""From a camera frame and an instruction to model inputs.

One prediction passes here from top to bottom: `load_image` makes an RGB picture of whatever the robot's camera driver
delivers, `OpenVLAImageProcessor` resizes and normalizes it for each vision tower, `OpenVLAProcessor` adds the prompt.

Pixel values and token ids equal those of the published `processing_prismatic.py` (transformers 4.40.1, timm 0.9.10).
"""

import io
import math
import os
import struct
import threading
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TVF
from transformers import BatchFeature, PreTrainedTokenizerFast, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ImagesKwargs, ProcessingKwargs

from .configuration_openvla import IMAGE_RESIZE_STRATEGIES, OpenVLAConfig, check_choice
from .files_openvla import local_folder, read_json
from .prompts_openvla import PROMPT_TEMPLATES, check_prompt_ids, check_unicode, has_words, read_instruction


# The lone word-boundary token of SentencePiece vocabularies (Llama, Mistral) and of byte-level BPE (Phi).
WORD_BOUNDARY_TOKENS = ("▁", "Ġ")


# Images ---------------------------------------------------------------------------------------------------------------


# What Pillow raises, according to the damage, while it reads a file, also one that was opened earlier or closed since.
UNREADABLE = (
    OSError, ValueError, SyntaxError, EOFError, AttributeError, IndexError, KeyError, TypeError, OverflowError,
    NotImplementedError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
# Pillow reads the pixels of an opened file when they are first looked at, and not from two threads at once.
_READING = threading.Lock()
LONGEST_SIDE = 64  # times the shorter one; a longer strip is no camera frame, and padding it would fill the memory


def _array_to_uint8(array: np.ndarray) -> np.ndarray:
    """Pixels of any dtype as uint8: floats are [0, 1] (or [0, 255] if any value exceeds 1), uint16 is 16-bit color."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if np.issubdtype(array.dtype, np.floating):
        return _floats_to_uint8(array)
    if np.issubdtype(array.dtype, np.integer):
        low, high = int(array.min()), int(array.max())
        if low < 0 or high > 65535:
            raise ValueError(f"Integer pixels range from {low} to {high}; expected 0 to 255.")
        if array.dtype.itemsize == 2 and array.dtype.kind == "u":
            if 0 < high <= 255:
                raise ValueError(
                    f"uint16 pixels reach {high} of 65535: a nearly black frame, or levels of 8 bits? "
                    "Give these as uint8."
                )
            return np.rint(array / 257.0).astype(np.uint8)
        return (np.rint(array / 257.0) if high > 255 else array).astype(np.uint8)
    raise ValueError(f"Cannot read pixels of dtype {array.dtype}; give uint8, uint16 or floats.")


def _floats_to_uint8(array: np.ndarray) -> np.ndarray:
    """Float pixels as uint8, if their values tell whether they are in [0, 1] or in [0, 255]."""
    low, high = float(array.min()), float(array.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("The image contains NaN or infinite pixels: the camera frame is broken, do not act on it.")
    if low < 0 or high > 255:
        raise ValueError(
            f"Float pixels range from {low:g} to {high:g}; expected [0, 1] or [0, 255]. Already normalized images "
            "must be brought back to [0, 1] first: the processor normalizes by itself."
        )
    whole = bool((array == np.rint(array)).all())
    # In [0, 255] a frame this dark is all but black, in [0, 1] it may be anything: the difference is a motion.
    if (high == 1 and whole) or (1 < high <= 2 and not whole):
        raise ValueError(
            f"Float pixels reach {high:g} and do not tell whether they are in [0, 1] or in [0, 255]"
            + (": they are all 0 or 1" if whole else ", e.g. after a resize that overshoots: clip them to [0, 1]")
            + ". Give uint8 levels instead."
        )
    return np.rint(array * (255.0 if high <= 1 else 1.0)).astype(np.uint8)


def _array_to_image(array: np.ndarray, channels_first: bool) -> Image.Image:
    """(H, W), (H, W, C) or (C, H, W) pixels as a PIL image. `channels_first` decides where both readings make sense."""
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3:
        raise ValueError(f"An image has 2 or 3 dimensions, got shape {array.shape}.")
    first, last = array.shape[0] in (1, 3, 4), array.shape[-1] in (1, 3, 4)
    if not (first or last):
        raise ValueError(f"No axis of shape {array.shape} is a channel axis (1, 3 or 4): give (H, W, 3) or (3, H, W).")
    if first and (channels_first or not last):
        array = np.moveaxis(array, 0, -1)
    if array.size == 0:
        raise ValueError(f"The image is empty: shape {array.shape}.")
    pixels = np.ascontiguousarray(_array_to_uint8(array))
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def _tensor_to_image(tensor: torch.Tensor) -> Image.Image:
    """The same of a tensor, channels first in doubt."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized or tensor.is_complex():
        raise ValueError(f"Cannot read an image from a {tensor.layout} tensor of {tensor.dtype} on {tensor.device}.")
    tensor = tensor.detach().cpu()
    return _array_to_image((tensor.float() if tensor.is_floating_point() else tensor).numpy(), channels_first=True)


def _open_image(file: Any, name: str) -> Image.Image:
    """The image in a file or stream, its pixels read."""
    try:
        with Image.open(file) as image:
            image.load()
            return image
    except UNREADABLE as error:
        raise ValueError(f"Cannot read {name} as an image: {error}.") from error


def load_image(image: Any) -> Image.Image:
    """One RGB picture of a PIL image, numpy array, torch tensor, nested list, file path or the bytes of such a file.

    Arrays and tensors may be (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels, uint8, uint16, bool or float. EXIF
    rotation is applied, transparency is composited over white, 16-bit color is scaled to 8 bits. Floats that are all 0
    or 1, or reach a little above 1, and uint16 that reaches 255 at the most are refused: they may be bright or black.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: If the pixels cannot be read (damaged or closed file, NaN, no channel axis, out of range, ambiguous,
            unknown type) or the image is 64 times as long as wide.
    """
    if isinstance(image, (str, os.PathLike)):
        path = os.fspath(image)
        shown = ascii(path) if len(path) <= 200 else f"{ascii(path[:200])}..."
        if not os.path.isfile(path):
            raise FileNotFoundError(f"No image file at {shown}. Give a local file (URLs and base64 are not read).")
        image = _open_image(path, shown)
    elif isinstance(image, (bytes, bytearray, memoryview)):
        image = _open_image(io.BytesIO(image), f"{len(image)} bytes that start with {bytes(image[:8])!r}")
    elif isinstance(image, torch.Tensor):
        image = _tensor_to_image(image)
    elif isinstance(image, np.ndarray):
        image = _array_to_image(image, channels_first=False)
    elif isinstance(image, (list, tuple)) and _is_pixel_list(image):
        image = _array_to_image(_pixel_array(image), channels_first=False)
    if not isinstance(image, Image.Image):
        raise ValueError(
            f"Cannot read an image from {type(image).__name__}; give a PIL image, an array, a tensor or a file path."
        )
    try:
        with _READING:
            image.load()
            if 0 in image.size:
                raise ValueError(f"it is empty, {image.size[0]}x{image.size[1]} pixels")
            image = ImageOps.exif_transpose(image)
    except UNREADABLE as error:
        raise ValueError(f"Cannot read the image: {error}.") from error
    if max(image.size) > LONGEST_SIDE * min(image.size):
        raise ValueError(f"An image of {image.size[0]}x{image.size[1]} pixels is a strip and no camera frame.")
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray(_array_to_uint8(np.asarray(image)))
    try:
        return _to_rgb(image)
    except UNREADABLE as error:
        raise ValueError(f"Cannot make RGB of an image of mode {image.mode}: {error}.") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode as RGB, what is transparent over white."""
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _is_pixel_list(value: Any) -> bool:
    """Whether nested lists hold numbers, as an array that came as JSON does, and not images."""
    for _ in range(4):  # (N, H, W, C)
        if isinstance(value, (list, tuple)) and value:
            value = value[0]
    return isinstance(value, (bool, int, float, np.number))


def _pixel_array(rows: list | tuple) -> np.ndarray:
    try:
        return np.asarray(rows)
    except (ValueError, TypeError) as error:
        raise ValueError(f"An image as nested lists must have rows of one length: {error}.") from error


def as_image_list(images: Any, depth: int = 0) -> list:
    """A flat list of single images, of one image, a list, or a batched (N, ., ., .) array or tensor."""
    if isinstance(images, (list, tuple)):
        if not _is_pixel_list(images):
            if depth == 3:
                raise ValueError("Images are nested more than three lists deep: give a list of images.")
            return [single for entry in images for single in as_image_list(entry, depth + 1)]
        images = _pixel_array(images)
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        return list(images)
    return [images]


def is_image_list(image: Any) -> bool:
    """Whether several images were given, or a list of one."""
    return isinstance(image, (list, tuple)) and not _is_pixel_list(image)


class OpenVLAImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    use_fused_vision_backbone: bool
    image_resize_strategy: str
    input_sizes: list
    interpolations: list
    means: list
    stds: list


class OpenVLAImageProcessor(BaseImageProcessor):
    """Resizes and normalizes images for one or two vision towers, the channels of both stacked.

    Reads the published `preprocessor_config.json` of `PrismaticImageProcessor`; its `tvf_*` fields repeat what the
    fields below say and are not kept.

    Args:
        use_fused_vision_backbone: Published field; two towers are described by lists of length two.
        image_resize_strategy: `"resize-naive"` (both sides to the input size), `"resize-crop"` (shorter side, then
            center crop) or `"letterbox"` (padded to a square with the mean color, that of the last of two towers).
        input_sizes: One (channels, height, width) per tower.
        interpolations: One of "bicubic", "bilinear", "lanczos", "nearest" per tower.
        means, stds: One triple per tower, for pixels in [0, 1].
        do_resize, do_rescale, rescale_factor, do_normalize: As in every image processor of the library.
    """

    model_input_names = ["pixel_values"]
    valid_kwargs = OpenVLAImageProcessorKwargs

    def __init__(
        self,
        use_fused_vision_backbone: bool = False,
        image_resize_strategy: str = "letterbox",
        input_sizes: list | None = None,
        interpolations: list | None = None,
        means: list | None = None,
        stds: list | None = None,
        do_resize: bool = True,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = True,
        **kwargs,
    ):
        # The code that `auto_map` names is that of the folder it came from, not of the one this will be saved to.
        kwargs = {key: value for key, value in kwargs.items() if not key.startswith("tvf_") and key != "auto_map"}
        super().__init__(**kwargs)
        check_choice("image_resize_strategy", image_resize_strategy, IMAGE_RESIZE_STRATEGIES)
        self.use_fused_vision_backbone = use_fused_vision_backbone
        self.image_resize_strategy = image_resize_strategy
        self.input_sizes = _triples("input_sizes", input_sizes) if input_sizes else [[3, 224, 224]]
        towers = len(self.input_sizes)
        if not isinstance(interpolations, (list, tuple, type(None))):
            raise ValueError(f"interpolations={interpolations!r}: expected a list, one name per tower.")
        self.interpolations = list(interpolations) if interpolations else ["bicubic"] * towers
        self.means = _triples("means", means) if means else [[0.5, 0.5, 0.5]] * towers
        self.stds = _triples("stds", stds) if stds else [[0.5, 0.5, 0.5]] * towers
        for field in ("interpolations", "means", "stds"):
            if len(getattr(self, field)) != towers:
                raise ValueError(
                    f"{field} has {len(getattr(self, field))} entries, input_sizes {towers}: one per tower."
                )
        if min(map(min, self.stds + self.input_sizes)) <= 0:
            raise ValueError(f"stds={self.stds}, input_sizes={self.input_sizes}: expected numbers above 0.")
        for interpolation in self.interpolations:
            check_choice("interpolation", interpolation, [mode.value for mode in InterpolationMode])
        self.do_resize, self.do_rescale, self.do_normalize = do_resize, do_rescale, do_normalize
        self.rescale_factor = rescale_factor

    def _resize(self, image: Image.Image, tower: int, strategy: str) -> Image.Image:
        """`image` at the input size of a tower; `letterbox` has padded it to a square before."""
        height, width = self.input_sizes[tower][-2:]
        interpolation = InterpolationMode(self.interpolations[tower])
        if strategy == "resize-naive":
            return TVF.resize(image, [height, width], interpolation, antialias=True)
        return TVF.center_crop(TVF.resize(image, [width], interpolation, antialias=True), [height, width])

    def _pad_to_square(self, image: Image.Image) -> Image.Image:
        """Borders in the mean color of the last tower, left and right or above and below."""
        side = max(image.size)
        left, top = (side - image.size[0]) // 2, (side - image.size[1]) // 2
        fill = [int(channel * 255) for channel in self.means[-1]]
        return TVF.pad(image, [left, top, left, top], fill=fill, padding_mode="constant")

    def _planes(self, image: Image.Image, options: dict[str, Any]) -> list[np.ndarray]:
        """The 3 * towers channels of one RGB image, (height, width) float32 each."""
        if options["do_resize"] and options["image_resize_strategy"] == "letterbox":
            image = self._pad_to_square(image)
        resized: dict[tuple, np.ndarray] = {}  # towers of one size and interpolation share the work
        planes: list[np.ndarray] = []
        for tower, size in enumerate(self.input_sizes):
            key = (tuple(size), self.interpolations[tower])
            if key not in resized:
                picture = image
                if options["do_resize"]:
                    picture = self._resize(image, tower, options["image_resize_strategy"])
                resized[key] = np.asarray(picture).transpose(2, 0, 1)
            planes += [np.take(levels, channel) for levels, channel in zip(self._levels(tower, options), resized[key])]
        return planes

    def _levels(self, tower: int, options: dict[str, Any]) -> np.ndarray:
        """(3, 256) float32 that the levels of each channel become: computed once, then looked up for every pixel."""
        levels = np.arange(256, dtype=np.float32)
        if options["do_rescale"]:
            # Divided by 255, not multiplied by 1/255: float32 rounds the two differently.
            levels = levels / np.float32(1 / options["rescale_factor"])
        if not options["do_normalize"]:
            return np.stack([levels] * 3)
        mean = np.asarray(self.means[tower], dtype=np.float32)[:, None]
        std = np.asarray(self.stds[tower], dtype=np.float32)[:, None]
        return (levels - mean) / std

    def preprocess(self, images: Any, return_tensors: str | None = None, **kwargs) -> BatchFeature:
        """Model inputs of images.

        Args:
            images: Whatever `load_image` reads, a list of such, or a batched array.
            return_tensors: `"pt"` for a tensor, else a numpy array.
            kwargs: `do_resize`, `do_rescale`, `rescale_factor`, `do_normalize`, `image_resize_strategy`, each for this
                call only.

        Returns:
            `pixel_values`: (N, 3 * towers, height, width) float32.
        """
        options = {
            name: getattr(self, name) if kwargs.get(name) is None else kwargs[name]
            for name in ("do_resize", "do_rescale", "rescale_factor", "do_normalize", "image_resize_strategy")
        }
        check_choice("image_resize_strategy", options["image_resize_strategy"], IMAGE_RESIZE_STRATEGIES)
        singles = as_image_list(images)
        if not singles:
            raise ValueError("No image given: the list is empty.")
        planes = np.stack([plane for image in singles for plane in self._planes(load_image(image), options)])
        pixel_values = planes.reshape(len(singles), -1, *planes.shape[1:])
        return BatchFeature(data={"pixel_values": pixel_values}, tensor_type=return_tensors)

    def apply_transform(self, img: Image.Image) -> torch.Tensor:
        """Published name: (3 * towers, height, width) float32 of one image."""
        return self.preprocess(img, return_tensors="pt")["pixel_values"][0]


def _triples(field: str, rows: Any) -> list[list]:
    """One list of three numbers (at most 10,000) for each tower."""
    if isinstance(rows, (list, tuple)) and all(isinstance(row, (list, tuple)) and len(row) == 3 for row in rows):
        if all(isinstance(number, (int, float)) and abs(number) <= 1e4 for row in rows for number in row):
            return [list(row) for row in rows]
    raise ValueError(f"{field}={rows!r}: expected three numbers for each tower, [[., ., .], ...].")


# Prompts --------------------------------------------------------------------------------------------------------------


# A fast tokenizer keeps padding, truncation and how it reads special tokens as state, and fails ("Already borrowed")
# where a second thread changes it.
_TOKENIZING = threading.Lock()


class OpenVLAProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    _defaults = {"common_kwargs": {"return_tensors": "pt"}}


class OpenVLAProcessor(ProcessorMixin):
    """Images and prompts together, in the published order: `processor(prompt, image)`.

    Args:
        image_processor: An `OpenVLAImageProcessor`.
        tokenizer: The tokenizer of the language model.
        prompt_template: Text with `{instruction}` in it. Default: what the checkpoint's config calls for.
    """

    valid_processor_kwargs = OpenVLAProcessorKwargs

    def __init__(self, image_processor=None, tokenizer=None, prompt_template=None, chat_template=None, **kwargs):
        if prompt_template is not None and "{instruction}" not in prompt_template:
            raise ValueError(f"prompt_template={prompt_template!r} has no {{instruction}} in it.")
        self.prompt_template = prompt_template
        self.n_action_tokens = 256  # the last ids of the tokenizer's own; `check_fits` asks the model
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Load image processor, tokenizer and prompt form of a folder or Hub id, published layout or today's.

        Raises:
            FileNotFoundError: If there is no such folder or Hub id, or a file of the processor is missing.
            ValueError: If a file is damaged, or the processor does not fit the config.json beside it.
        """
        name, hub = pretrained_model_name_or_path, {key: kwargs[key] for key in HUB_KWARGS if key in kwargs}
        folder = local_folder(name)
        has_config = False
        if folder is not None:
            folder /= kwargs.get("subfolder") or ""
            has_config = (folder / "config.json").is_file()
            _check_processor_files(folder)
        processor = super().from_pretrained(name, **kwargs)
        if processor.prompt_template is None or has_config:
            config, _ = OpenVLAConfig.get_config_dict(name, **hub)
            if processor.prompt_template is None:
                processor.prompt_template = prompt_template_of(config)
            processor.check_fits(OpenVLAConfig.from_dict(config))
        return processor

    def check_fits(self, config: OpenVLAConfig) -> None:
        """Raise a `ValueError` if a model of this configuration takes other images, tokens or prompts. If it fits, the
        processor knows from then on how many tokens of the model stand for actions."""
        sizes = [kwargs.get("img_size", size) for size, kwargs in zip(config.image_sizes, config.timm_model_kwargs)]
        expected = [[3, size, size] if isinstance(size, int) else [3, *size] for size in sizes]
        if self.image_processor.input_sizes != expected:
            raise ValueError(
                f"The processor makes images of {self.image_processor.input_sizes} (input_sizes), the model takes "
                f"{expected} (image_sizes): it is the processor of another model, take that of the weights."
            )
        left_out = [
            name for name in ("do_resize", "do_rescale", "do_normalize") if not getattr(self.image_processor, name)
        ]
        if left_out:
            raise ValueError(
                f"The processor has {', '.join(f'{name}=False' for name in left_out)}, the model was trained on "
                "resized and normalized images: switch a step off in a single call of the processor only."
            )
        if self.tokenizer.vocab_size != config.action_vocab_size:
            raise ValueError(
                f"The tokenizer has {self.tokenizer.vocab_size} tokens of its own, the model expects "
                f"{config.action_vocab_size} (text_config.vocab_size - pad_to_multiple_of), the last of which stand "
                "for actions: it is the tokenizer of another model, or the embedding table was resized without "
                "adapting pad_to_multiple_of."
            )
        self.n_action_tokens = config.n_action_bins
        try:
            check_prompt_ids(self.prompt_ids("open the drawer"), config)
        except ValueError as error:
            raise ValueError(
                "The tokenizer (tokenizer.json, tokenizer_config.json) or the prompt form (prompt_template) is not the "
                f"model's. {error}"
            ) from error

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        # The library's own place to say what a processor is made of (5.4 to 5.24).
        # Not through the auto classes: published folders name `PrismaticImageProcessor`, whose code is frozen, and
        # transformers 5 rebuilds the pre-tokenizer of a `LlamaTokenizer`, which then differs from 4.40.1 on spaces.
        # The fast tokenizer takes tokenizer.json as it is and gives the ids the weights were trained with.
        kwargs.pop("trust_remote_code", None)
        try:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(pretrained_model_name_or_path, **kwargs)
        except (TypeError, AttributeError) as error:
            raise ValueError(
                f"The tokenizer_config.json of '{pretrained_model_name_or_path}' cannot be used ({error}): take the "
                "one of the weights."
            ) from error
        if not isinstance(tokenizer.model_max_length, (int, float)):
            raise ValueError(
                f"model_max_length={tokenizer.model_max_length!r} in the tokenizer_config.json of "
                f"'{pretrained_model_name_or_path}': expected a number of tokens."
            )
        for name in ("auto_map", "is_local", "local_files_only"):
            tokenizer.init_kwargs.pop(name, None)  # of that folder and this machine, not of where it will be saved
        return [OpenVLAImageProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs), tokenizer]

    @property
    def empty_token_id(self) -> int | None:
        """Id of the lone word-boundary token that ends a prompt before the first action token; None without one."""
        ids = map(self.tokenizer.backend_tokenizer.token_to_id, WORD_BOUNDARY_TOKENS)
        return next((token_id for token_id in ids if token_id is not None), None)

    def format_prompt(self, instruction):
        """The prompt of an instruction (or the prompts of a list), in the form the checkpoint was trained with.

        See `read_instruction` for what becomes of upper case, blanks and complete prompts.
        """
        if isinstance(instruction, (list, tuple)):
            return [self.format_prompt(single) for single in instruction]
        template = self.prompt_template or PROMPT_TEMPLATES["openvla"]
        text = read_instruction(instruction, template)
        if any(token in text for token in self._special_tokens_of_template):
            raise ValueError(
                f"The instruction {text!r:.200} holds a special token, and so does the prompt form: leave it out."
            )
        return template.replace("{instruction}", text)

    @property
    def _special_tokens_of_template(self) -> list[str]:
        """All special tokens, if the prompt form is made with some: its prompts cannot be read as text alone."""
        tokens = [token.content for token in self.tokenizer.added_tokens_decoder.values()]
        template = self.prompt_template or ""
        return tokens if any(token in template for token in tokens) else []

    def prompt_ids(self, instruction: str, allow_empty: bool = False) -> list[int]:
        """Token ids of the prompt of one instruction, the end that `predict_action` adds included: what training and
        prediction see.

        Args:
            allow_empty: Take "" as well, for training on steps without words; nothing may act on it.
        """
        if allow_empty and not has_words(instruction):
            text = (self.prompt_template or PROMPT_TEMPLATES["openvla"]).replace("{instruction}", "")
        else:
            text = self.format_prompt(instruction)
        ids = self._tokenize(text)["input_ids"]
        empty = self.empty_token_id
        return ids if empty is None or ids[-1] == empty else [*ids, empty]

    def _tokenize(self, text: str | list[str], **options):
        """What the tokenizer makes of prompts, from any thread: text throughout, in which neither the name of a special
        token nor a character of an action token stands for that token.

        A text that ends in action tokens and the end of sequence is a training text of the original and read as such.
        `split_special_tokens` leaves the choice to the caller.
        """
        texts = [text] if isinstance(text, str) else list(text)
        for entry in texts:
            check_unicode(entry)
        with _TOKENIZING:
            if "split_special_tokens" in options:
                return self.tokenizer(text, **options)
            is_training_text = [self._is_training_text(entry) for entry in texts]
            split = not self._special_tokens_of_template
            if len(set(is_training_text)) == 1:
                encoded = self.tokenizer(text, split_special_tokens=split and not is_training_text[0], **options)
                if is_training_text[0] or not any(map(self._has_action_tokens, (row.ids for row in encoded.encodings))):
                    return encoded
            rows = []
            for entry, training in zip(texts, is_training_text):
                chosen = {"add_special_tokens": options.get("add_special_tokens", True), "verbose": False}
                ids = self.tokenizer(entry, split_special_tokens=split and not training, **chosen)["input_ids"]
                rows.append(ids if training else self._spell_action_tokens(ids))
            if options.get("truncation") not in (None, False, "do_not_truncate"):
                rows = [row[: options.get("max_length") or self.tokenizer.model_max_length] for row in rows]
            single = isinstance(text, str) and options.get("return_tensors") is None
            names = ("max_length", "pad_to_multiple_of", "padding_side", "return_tensors", "return_attention_mask")
            return self.tokenizer.pad(
                {"input_ids": rows[0] if single else rows},
                padding=options.get("padding") or False,
                verbose=False,
                **{name: options[name] for name in names if name in options},
            )

    def _is_training_text(self, text: str) -> bool:
        if self.tokenizer.eos_token is None or not text.endswith(self.tokenizer.eos_token):
            return False
        return self._has_action_tokens(self.tokenizer(text, split_special_tokens=False)["input_ids"][-2:-1])

    def _has_action_tokens(self, ids: list[int]) -> bool:
        end = self.tokenizer.vocab_size
        return any(end - self.n_action_tokens <= token_id < end for token_id in ids)

    def _spell_action_tokens(self, ids: list[int]) -> list[int]:
        """Action tokens, which text may hold as ordinary characters, spelled in the tokens of their bytes."""
        spelled: list[int] = []
        for token_id in ids:
            if not self._has_action_tokens([token_id]):
                spelled.append(token_id)
                continue
            token = self.tokenizer.backend_tokenizer.id_to_token(token_id)
            for pieces in (
                [f"<0x{byte:02X}>" for byte in token.encode()],
                list(token),
            ):  # SentencePiece, byte-level BPE
                piece_ids = [self.tokenizer.backend_tokenizer.token_to_id(piece) for piece in pieces]
                if None not in piece_ids and not self._has_action_tokens(piece_ids):
                    spelled += piece_ids
                    break
            else:
                raise ValueError(f"The text holds {token!r}, which stands for a motion: say it in other words.")
        return spelled

    def __call__(self, text=None, images=None, **kwargs) -> BatchFeature:
        """Token ids of prompts and pixel values of images.

        Args:
            text: A prompt or a list of prompts (see `format_prompt`). Names of special tokens in it and characters that
                stand for actions are text; `split_special_tokens=False` reads them as tokens.
            images: As many images as prompts, in any form `load_image` reads.
            kwargs: Options of the tokenizer (`padding`, `truncation`, `max_length`, ...) and of the image processor.
                Prompts of a batch are padded to the longest unless `padding` says otherwise.

        Returns:
            `input_ids` and `attention_mask` (N, length), `pixel_values` (N, 3 * towers, height, width).
        """
        if text is None and images is None:
            raise ValueError("Nothing to process: give text, images or both.")
        if _is_text(images) and not _is_text(text):
            text, images = images, text  # the library's own processors take (images, text)
        if kwargs.get("text_pair") is not None or kwargs.get("text_kwargs", {}).get("text_pair") is not None:
            raise ValueError("text_pair: a prompt is one text, give it as text.")
        chosen = kwargs.pop("split_special_tokens", None)
        # The library's rules of nested and flat options; it offers them under this name only (5.4 to 5.24).
        merged = self._merge_kwargs(
            OpenVLAProcessorKwargs, tokenizer_init_kwargs=getattr(self.tokenizer, "init_kwargs", {}), **kwargs
        )
        data = {}
        return_tensors = merged["text_kwargs"].get("return_tensors")
        if text is not None:
            if not _is_text(text):
                raise ValueError(
                    f"A prompt is a string or a list of strings, got {type(text).__name__}: {text!r:.200}."
                )
            if not isinstance(text, str) and len(text) > 1 and return_tensors is not None:
                merged["text_kwargs"].setdefault("padding", True)
            merged["text_kwargs"].pop("split_special_tokens", None)  # of the tokenizer's files
            if chosen is not None:
                merged["text_kwargs"]["split_special_tokens"] = chosen
            data.update(self._tokenize(text, **merged["text_kwargs"]))
        if images is not None:
            data["pixel_values"] = self.image_processor(images, **merged["images_kwargs"])["pixel_values"]
            prompts = None if text is None else 1 if isinstance(text, str) else len(text)
            if prompts is not None and prompts != len(data["pixel_values"]):
                raise ValueError(
                    f"{prompts} prompt(s) for {len(data['pixel_values'])} image(s): give one image for each prompt."
                )
        return BatchFeature(data=data, tensor_type=return_tensors)


PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


def _check_processor_files(folder: Path) -> None:
    """Raise an error that names the file, if one of the processor is missing, damaged or a Git LFS pointer."""
    if not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(
            f"'{folder}' has no tokenizer.json: copy the tokenizer of the model beside its weights."
        )
    if not isinstance(read_json(folder / "tokenizer.json").get("model"), dict):
        raise ValueError(f"'{folder / 'tokenizer.json'}' holds no tokenizer ('model'): copy or download it again.")
    contents = {
        name: read_json(folder / name)
        for name in (*PROCESSOR_FILES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
        if (folder / name).is_file()
    }
    # Today's layout keeps the image processor inside processor_config.json, the published one in a file of its own.
    if "preprocessor_config.json" not in contents and "image_processor" not in contents.get(
        "processor_config.json", {}
    ):
        raise FileNotFoundError(
            f"'{folder}' has no preprocessor_config.json: copy the image processor of the model beside its weights."
        )


def prompt_template_of(config: dict[str, Any]) -> str:
    """The prompt form of a model config: the chat form of v01 for Vicuna language models, else the plain one."""
    is_vicuna = str(config.get("llm_backbone_id", "")).startswith("vicuna")
    return PROMPT_TEMPLATES["openvla-v01" if is_vicuna else "openvla"]


def _is_text(value: Any) -> bool:
    """A string, or a non-empty list of strings."""
    if isinstance(value, str):
        return True
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(entry, str) for entry in value)


__all__ = ["OpenVLAImageProcessor", "OpenVLAProcessor", "load_image", "read_instruction"]
