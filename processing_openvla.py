"""The processor: prompts and images to model inputs.

Token ids equal those of the published `processing_prismatic.py` (transformers 4.40.1).
"""

import copy
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from transformers import BatchFeature, PreTrainedTokenizerFast, ProcessorMixin
from transformers.processing_utils import ProcessingKwargs
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME, cached_file

from .configuration_openvla import OpenVLAConfig
from .files_openvla import QUIET, local_folder
from .forks_openvla import lock_over_forks
from .frames_openvla import camera_images
from .image_processing_openvla import OpenVLAImageProcessor
from .oft_openvla import find_oft, oft_folder
from .pixels_openvla import PIXELS, load_image
from .processor_files_openvla import (
    OF_MODEL_ALONE,
    cached_folder,
    check_processor_files,
    check_tokenizer,
    hub_options,
    image_fields,
    pixels_of_older_run,
)
from .prompts_openvla import (
    PROMPT_TEMPLATES,
    check_prompt_ids,
    check_unicode,
    has_words,
    make_prompt,
    read_instruction,
    special_tokens_of,
    spell_action_tokens,
)


if TYPE_CHECKING:  # of a local folder transformers 5.4 and 5.5 copy no more files than this one names
    from .cameras_openvla import find_cameras  # noqa: F401
    from .choices_openvla import closest  # noqa: F401
    from .jpeg_openvla import PictureFile  # noqa: F401
    from .tensors_openvla import is_tensor  # noqa: F401


# The lone word-boundary token of SentencePiece vocabularies (Llama, Mistral) and of byte-level BPE (Phi).
WORD_BOUNDARY_TOKENS = ("▁", "Ġ")
# A fast tokenizer keeps padding, truncation and how it reads special tokens as state, and fails ("Already borrowed")
# where a second thread changes it.
_TOKENIZING = lock_over_forks()


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
        # `check_fits` asks the model for these two
        self.n_action_tokens = 256  # the last ids of the tokenizer's own
        self.camera_names = ["primary"]
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Load image processor, tokenizer and prompt form of a folder or Hub id, published layout or today's.

        A run of an older version says only in finetune.json what its model was trained to see: a warning tells what is
        assumed then (`pixels_of_older_run`). A folder of OpenVLA-OFT gives its evaluation pixels.

        Args:
            action_head, base, camera_names: Of a folder of OpenVLA-OFT, as in `from_pretrained` of the model.

        Raises:
            FileNotFoundError: If there is no such folder or Hub id, or a file of the processor is missing.
            ValueError: If a file is damaged, or the processor does not fit the config.json beside it.
        """
        name, hub = pretrained_model_name_or_path, hub_options(kwargs)
        given: dict[str, Any] = {
            key: kwargs.pop(key) for key in ("action_head", "base", "camera_names") if key in kwargs
        }
        # Of the model, by whoever gives both the same options: as fields they could not be saved.
        kwargs = {key: value for key, value in kwargs.items() if key not in OF_MODEL_ALONE}
        folder = local_folder(name)
        if folder is not None:
            folder /= kwargs.get("subfolder") or ""
            check_processor_files(folder)
        try:
            processor = super().from_pretrained(name, **kwargs)
        except Exception:
            if folder is not None:
                check_tokenizer(folder)
            raise
        place = folder if folder is not None else cached_folder(name, hub)
        if place is not None and (pixels := pixels_of_older_run(place, image_fields(place))):
            processor = processor.with_pixels(**pixels)
        oft = find_oft(oft_folder(name, **hub), given.get("action_head"))
        if oft is not None:
            if not image_fields(oft.folder).keys() & PIXELS["oft"].keys():
                processor = processor.with_pixels(**PIXELS["oft"])
            given["action_chunk"] = 1  # which pixels and prompts do not depend on, and no file says
        has_config = cached_file(name, "config.json", **QUIET, **hub) is not None
        if processor.prompt_template is None or has_config or oft is not None:
            config, _ = OpenVLAConfig.get_config_dict(name, **hub, **given)
            if processor.prompt_template is None:
                processor.prompt_template = prompt_template_of(config)
            processor.check_fits(OpenVLAConfig.from_dict(config))
        return processor

    def with_pixels(
        self, resize_filter: str | None, center_crop: float | None, jpeg_quality: int | None = None
    ) -> "OpenVLAProcessor":
        """This processor for a model that was trained to see other pixels, see `OpenVLAImageProcessor`."""
        processor, images = copy.copy(self), self.image_processor
        shown = {"resize_filter": resize_filter, "center_crop": center_crop, "jpeg_quality": jpeg_quality}
        fields = {**images.to_dict(), **shown}
        processor.image_processor = type(images).from_dict(fields)
        return processor

    def check_fits(self, config: OpenVLAConfig) -> None:
        """Raise a `ValueError` if a model of this configuration takes other images, tokens or prompts. If it fits, the
        processor knows from then on how many tokens of the model stand for actions, which cameras it sees, and the
        prompt form that the model calls for, if it has none of its own."""
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
        self.n_action_tokens, self.camera_names = config.n_action_bins, list(config.camera_names)
        self.ask_as_model(config)
        try:
            check_prompt_ids(self.prompt_ids("open the drawer"), config)
        except ValueError as error:
            raise ValueError(
                "The tokenizer (tokenizer.json, tokenizer_config.json) or the prompt form (prompt_template) is not the "
                f"model's. {error}"
            ) from error

    def ask_as_model(self, config: OpenVLAConfig) -> None:
        """Ask in the prompt form that the model calls for, unless the processor has one of its own: several models may
        be given the same one."""
        if self.prompt_template in (None, getattr(self, "_form_of_model", None)):
            self.prompt_template = self._form_of_model = prompt_template_of(vars(config))

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
        return make_prompt(instruction, template, self._special_tokens_of_template)

    @property
    def _special_tokens_of_template(self) -> list[str]:
        """All special tokens, if the prompt form is made with some: its prompts cannot be read as text alone."""
        tokens = [token.content for token in self.tokenizer.added_tokens_decoder.values()]
        return special_tokens_of(self.prompt_template or "", tokens)

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
                encoded = self.tokenizer(text, **options)
                _warn_if_cut(sum(row.attention_mask) for row in encoded.encodings if row.overflowing)
                return encoded
            is_training_text = [self._is_training_text(entry) for entry in texts]
            split = not self._special_tokens_of_template
            if len(set(is_training_text)) == 1:
                encoded = self.tokenizer(text, split_special_tokens=split and not is_training_text[0], **options)
                if is_training_text[0] or not any(map(self._has_action_tokens, (row.ids for row in encoded.encodings))):
                    _warn_if_cut(sum(row.attention_mask) for row in encoded.encodings if row.overflowing)
                    return encoded
            rows = []
            for entry, training in zip(texts, is_training_text):
                chosen = {"add_special_tokens": options.get("add_special_tokens", True), "verbose": False}
                ids = self.tokenizer(entry, split_special_tokens=split and not training, **chosen)["input_ids"]
                rows.append(ids if training else self._spell_action_tokens(ids))
            if options.get("truncation") not in (None, False, "do_not_truncate"):
                longest = options.get("max_length") or self.tokenizer.model_max_length
                _warn_if_cut(longest for row in rows if len(row) > longest)
                rows = [row[:longest] for row in rows]
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
        end = self.tokenizer.vocab_size
        return spell_action_tokens(ids, range(end - self.n_action_tokens, end), self.tokenizer.backend_tokenizer)

    def _warn_of_other_prompts(self, texts: Iterable[str]) -> None:
        """Say that texts that go with an image are not in the form of a prompt: a model acts on any words."""
        form = self.prompt_template or PROMPT_TEMPLATES["openvla"]
        before, after, *_ = form.split("{instruction}")
        for text in texts:
            rest = text.removeprefix(before)
            said = rest[: rest.find(after)] if after else rest
            if not (text.startswith(before) and after in rest and has_words(said)):
                warnings.warn(
                    f"{text!r:.200} is no prompt of this model, which was trained on {form!r}: make it with "
                    "processor.format_prompt(instruction), or the action may be any.",
                    stacklevel=3,
                )

    def pixel_values(self, images: Any, **options: Any) -> Any:
        """(N, cameras * 3 * towers, height, width) of images as `__call__` takes them; `options` are those of the image
        processor."""
        samples = camera_images(images, self.camera_names)
        flat = [image for sample in samples for image in sample]
        pixels = self.image_processor(flat, **options)["pixel_values"]
        return pixels.reshape(len(samples), -1, *pixels.shape[2:])

    def __call__(self, text=None, images=None, state=None, **kwargs) -> BatchFeature:
        """Token ids of prompts and pixel values of images.

        Args:
            text: A prompt or a list of prompts (see `format_prompt`). Names of special tokens in it and characters that
                stand for actions are text; `split_special_tokens=False` reads them as tokens.
            images: As many images as prompts, in any form `load_image` reads; of a model of several cameras as many
                `{camera: image}`.
            state: (S,) or (N, S) of the robot, handed on as it is to `predict_action(**inputs)`, which knows its units.
            kwargs: Options of the tokenizer (`padding`, `truncation`, `max_length`, ...) and of the image processor.
                Prompts of a batch are padded to the longest unless `padding` says otherwise.

        Returns:
            `input_ids` and `attention_mask` (N, length), `pixel_values` (N, cameras * 3 * towers, height, width).
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
                self._warn_of_other_prompts([text] if isinstance(text, str) else text)
        if images is not None:
            data["pixel_values"] = self.pixel_values(images, **merged["images_kwargs"])
            prompts = None if text is None else 1 if isinstance(text, str) else len(text)
            if prompts is not None and prompts != len(data["pixel_values"]):
                raise ValueError(
                    f"{prompts} prompt(s) for {len(data['pixel_values'])} image(s): give one image for each prompt."
                )
        inputs = BatchFeature(data=data, tensor_type=return_tensors)
        if state is not None:
            inputs["state"] = state  # not a tensor of ours, which `inputs.to(dtype)` would round
        return inputs


def prompt_template_of(config: Mapping[str, Any]) -> str:
    """The prompt form of a model config: the chat form of v01 for Vicuna language models, else the plain one."""
    is_vicuna = str(config.get("llm_backbone_id", "")).startswith("vicuna")
    return PROMPT_TEMPLATES["openvla-v01" if is_vicuna else "openvla"]


def _warn_if_cut(lengths: Iterable[int]) -> None:
    """Say that prompts were cut to so many tokens each."""
    cut = list(lengths)
    if cut:
        warnings.warn(
            f"{len(cut)} prompt(s) were cut to {cut[0]} tokens (truncation): the words at their end, which ask for the "
            "action, are lost. Shorten the instruction, or give a larger max_length.",
            stacklevel=4,
        )


def _is_text(value: Any) -> bool:
    """A string, or a non-empty list of strings."""
    if isinstance(value, str):
        return True
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(entry, str) for entry in value)


if __name__.startswith(f"{TRANSFORMERS_DYNAMIC_MODULE_NAME}."):
    # Code of a Hub folder. AutoProcessor registers its own copy alone: the processor of a model would be saved without
    # a word of the code that reads it, and AutoProcessor then loads a bare tokenizer (5.4 to 5.24).
    OpenVLAProcessor.register_for_auto_class()


__all__ = ["OpenVLAImageProcessor", "OpenVLAProcessor", "load_image", "read_instruction"]
