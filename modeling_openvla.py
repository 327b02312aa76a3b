"""OpenVLA: an image and an instruction go in, a robot action comes out.

One prediction goes through `inputs_openvla` and `processing_openvla` (prompt and pixels), `vision_openvla` (towers,
projector), the language model here, `action_heads_openvla` and `decoding_openvla` (which tokens) and `action_tokenizer`
(units); `predict_action` names the steps.

Shapes: `batch` samples, `length` prompt tokens, `num_patches` image patches (256 at 224 pixels), `hidden` width of the
language model, `action_dim` numbers of one action.

The published weights keep their tensor names. Differences from the published code: README.
"""

from collections.abc import Sequence
from functools import cache
from inspect import signature
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Cache, GenerationMixin

from .action_tokenizer import check_same_action_dim, get_action_stats, resolve_unnorm_key, units_of, unnormalize_actions
from .configuration_openvla import OpenVLAConfig
from .decoding_openvla import Prefix, are_finite
from .embeddings_openvla import ActionVocabulary
from .generation_openvla import OpenVLAGeneration
from .graphs_openvla import Preparation, before_learning, prepare
from .inputs_openvla import (
    ModelInputs,
    PromptLayout,
    as_tensor,
    check_are_tensors,
    check_pixel_values,
    check_prompts,
    place_actions,
    process_raw,
    read_committed,
    read_draft,
    read_state,
    read_unnorm_keys,
)
from .loading_openvla import OpenVLAPreTrainedModel
from .modules_openvla import evaluation_mode, one_type
from .outputs_openvla import CACHE, ActionPrediction, OpenVLAOutput, one_cache
from .parallel_openvla import ActionSequence, action_sequence
from .patches_openvla import IGNORE_INDEX, PatchLayout, find_placeholders
from .quantized_linear_openvla import type_of_inputs
from .sampling_openvla import Choice, check_flags, read_sampling
from .stages_openvla import stage
from .vision_openvla import OpenVLAProjector, OpenVLAVisionBackbone


if TYPE_CHECKING:  # of a local folder transformers 5.4 and 5.5 copy no more files than this one names
    from .action_heads_openvla import make_head  # noqa: F401
    from .active_adapters_openvla import AdapterBelongings  # noqa: F401
    from .adapter_state_openvla import AdapterState  # noqa: F401
    from .adapter_weights_openvla import AdapterWeights  # noqa: F401
    from .adapters_openvla import find_adapter  # noqa: F401
    from .cameras_openvla import find_cameras  # noqa: F401
    from .choices_openvla import closest  # noqa: F401
    from .compiled_openvla import CompiledLayer  # noqa: F401
    from .files_openvla import local_folder  # noqa: F401
    from .float8_linear_openvla import Float8Linear  # noqa: F401
    from .forks_openvla import lock_over_forks  # noqa: F401
    from .frames_openvla import PixelSteps  # noqa: F401
    from .image_processing_openvla import OpenVLAImageProcessor  # noqa: F401
    from .int4_linear_openvla import Int4Linear  # noqa: F401
    from .int8_linear_openvla import Int8Linear  # noqa: F401
    from .jpeg_openvla import PictureFile  # noqa: F401
    from .llama_openvla import open_steps  # noqa: F401
    from .oft_openvla import find_oft  # noqa: F401
    from .parallel_graphs_openvla import SequenceGraph  # noqa: F401
    from .parallel_heads_openvla import ParallelTokenHead  # noqa: F401
    from .parts_openvla import ModelParts  # noqa: F401
    from .pixels_openvla import load_image  # noqa: F401
    from .processing_openvla import OpenVLAProcessor  # noqa: F401
    from .processor_files_openvla import hub_options  # noqa: F401
    from .products_openvla import take_fast_products  # noqa: F401
    from .prompts_openvla import check_prompt_ids  # noqa: F401
    from .quantization_openvla import take_quantization  # noqa: F401
    from .recordings_openvla import Recorded  # noqa: F401
    from .tensors_openvla import is_tensor  # noqa: F401
    from .token_head_openvla import TokenHead  # noqa: F401
    from .weights_openvla import check_folder  # noqa: F401


# GenerationMixin is named for the library, which looks for it among the direct bases (transformers 5.4 to 5.24).
class OpenVLAForActionPrediction(ActionVocabulary, OpenVLAGeneration, OpenVLAPreTrainedModel, GenerationMixin):
    """Vision towers, projector and language model, under the published tensor names.

    `forward` and `generate` take the plain prompts of `OpenVLAProcessor` and insert the image patches after the first
    token by themselves. Prompts that already hold `num_patches` placeholders (`config.image_token_id`) per row are
    taken as they are.

    Elsewhere are `from_pretrained`, `save_pretrained`, `device` (`loading_openvla`), `generate` (`generation_openvla`),
    `norm_stats`, `processor`, `action_chunk`, `camera_names` and what else an active adapter may bring
    (`active_adapters_openvla`), heads and projectors (`parts_openvla`), embeddings (`embeddings_openvla`).
    """

    def __init__(self, config: OpenVLAConfig):
        super().__init__(config)
        self.vision_backbone = OpenVLAVisionBackbone(config)
        self.projector = OpenVLAProjector(
            self.vision_backbone.embed_dim, config.text_config.hidden_size, config.use_fused_vision_backbone
        )
        # One dtype for the complete model, also where the config names another for its language model.
        try:
            self.language_model = AutoModelForCausalLM.from_config(config.text_config, dtype=torch.get_default_dtype())
        except (TypeError, AttributeError, KeyError, ArithmeticError, RuntimeError) as error:
            raise ValueError(f"text_config cannot be built as a language model: {error}") from error
        self._make_parts()
        self.action_tokenizer = self.action_head.tokenizer
        # Published names, which clients of the original read
        self.vocab_size: int = config.action_vocab_size  # end of the action tokens
        self.bins: np.ndarray = self.action_tokenizer.bins
        self.bin_centers: np.ndarray = self.action_tokenizer.bin_centers
        self.pad_token_id: int | None = config.pad_token_id
        self.llm_dim: int = config.text_config.hidden_size
        self._checked_statistics: dict[str, Any] = {}
        self.post_init()

    # Forward ----------------------------------------------------------------------------------------------------------

    @property
    def num_patches(self) -> int:
        """Positions of a prompt that are no text: image patches of all cameras, and the state where it is seen."""
        return len(self.camera_names) * self.vision_backbone.num_patches + (self.config.proprio_dim is not None)

    def encode_images(self, pixel_values: torch.Tensor, condition: torch.Tensor | None = None) -> torch.Tensor:
        """(batch, cameras * 3 * towers, height, width) -> (batch, patches of all cameras, hidden), in type and on
        device of the model. `condition` (batch, hidden) is the mean embedding of each prompt's words, for FiLM."""
        features = self.vision_backbone(pixel_values.to(self.device), condition)
        return self.projector(features.to(type_of_inputs(self.projector, features.dtype)))

    def _encode(
        self, pixel_values: torch.Tensor, proprio: torch.Tensor | None, condition: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(batch, num_patches, hidden) of images and, where the model sees it, the state (batch, proprio_dim)."""
        # Only models with FiLM give a second argument: encode_images(pixel_values) is what others replace.
        features = self.encode_images(pixel_values, *([] if condition is None else [condition]))
        expected = None if self.config.proprio_dim is None else (len(features), self.config.proprio_dim)
        found = None if proprio is None else tuple(proprio.shape)
        if found != expected:
            raise ValueError(f"The state of the robot (proprio) has shape {found}, the model sees {expected}.")
        if proprio is None:
            return features
        kind = type_of_inputs(self.proprio_projector.fc1, features.dtype)
        state = self.proprio_projector(proprio.to(features.device, kind))
        return torch.cat([features, state.to(features)], dim=1)

    def _placeholders(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor | None:
        return find_placeholders(
            input_ids, inputs_embeds, self.num_patches, self.config.image_token_id, self.get_input_embeddings()
        )

    def _merge(self, input_ids, inputs_embeds, attention_mask, features) -> tuple[torch.Tensor, PatchLayout | None]:
        """Embeddings with the patches in place, and where they stand if they were inserted (None: at placeholders)."""
        placeholders = self._placeholders(input_ids, inputs_embeds)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if features.shape[0] != inputs_embeds.shape[0]:
            raise ValueError(
                f"{features.shape[0]} image(s) for {inputs_embeds.shape[0]} prompt(s): give one image for each prompt."
            )
        layout, shape = None, inputs_embeds.shape[:2]
        if placeholders is None:
            if attention_mask is not None and attention_mask.shape != shape:
                raise ValueError(
                    f"attention_mask has shape {tuple(attention_mask.shape)}; with a plain prompt and an image give "
                    f"(batch, length), here {tuple(shape)}: the patches are added to it."
                )
            layout = PatchLayout(attention_mask, shape, features.shape[1], device=inputs_embeds.device)
            inputs_embeds, placeholders = layout.insert(inputs_embeds, 0.0), layout.is_patch
        features = features.to(inputs_embeds.device, inputs_embeds.dtype)
        return inputs_embeds.masked_scatter(placeholders[..., None].to(inputs_embeds.device), features), layout

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_projector_features: bool | None = None,
        return_dict: bool | None = None,
        position_ids: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Cache | None = None,
        proprio: torch.Tensor | None = None,
        first_action: torch.Tensor | None = None,
        num_actions: int | None = None,
        noisy_actions: torch.Tensor | None = None,
        times: torch.Tensor | None = None,
        num_committed: torch.Tensor | int = 0,
        film_padding: bool = False,
        **kwargs,
    ) -> OpenVLAOutput | tuple:
        """Logits (and loss) of prompts, with or without an image; or in one pass what a parallel head answers.

        Args:
            input_ids: (batch, length) plain prompt, padded on either side, or one with placeholders.
            attention_mask: (batch, length), 0 marks padding.
            pixel_values: (batch, cameras * 3 * towers, height, width) normalized images, or None for text alone.
            labels, position_ids: (batch, length) in the coordinates of `input_ids`; label -100 where no loss is wanted.
            inputs_embeds: (batch, length, hidden) instead of `input_ids`.
            output_projector_features: With `return_dict=False`, append the projected patches to the tuple.
            logits_to_keep: Compute logits of the last so many positions only (0: of all).
            cache: Another name of `past_key_values`.
            proprio: (batch, proprio_dim) normalized state of the robot, of a model that sees it; with an image only.
            first_action: (batch,) index of the first placeholder of an action in `input_ids`, which are plain prompts
                with `num_actions` placeholders and the end after them, padded on the right: for a head that predicts
                all in one pass. The output has `predicted`, or `logits` of the actions and the end.
            noisy_actions, times: (batch, K, A) and (batch,), of a diffusion head.
            num_committed: (batch, 1), or one number: so many placeholders, the first, keep their tokens' embeddings.
            film_padding: Padding counts as words of the prompt for FiLM, as in the training of OpenVLA-OFT.

        Returns:
            `OpenVLAOutput`, or a tuple if `return_dict` is False.

        Raises:
            ValueError: If neither or both of `input_ids` and `inputs_embeds` are given, or images do not fit prompts.
        """
        before_learning(self)
        if first_action is not None:
            if not self.action_head.parallel:
                raise ValueError(
                    f"first_action is for heads that predict in one pass, action_head='{self.config.action_head}' is "
                    "none: leave it out."
                )
            if input_ids is None or pixel_values is None or num_actions is None:
                raise ValueError("first_action goes with input_ids, pixel_values and num_actions: give all of them.")
            sequence = action_sequence(
                self, input_ids, attention_mask, pixel_values, proprio, first_action, num_actions,
                num_committed=num_committed, with_time=times is not None, film_padding=film_padding,
            )  # fmt: skip
            return self.action_head.forward_sequence(
                self, sequence, num_actions, noisy_actions=noisy_actions, times=times
            )
        check_are_tensors(kwargs, input_ids=input_ids, pixel_values=pixel_values)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        return_dict = self.config.return_dict if return_dict is None else return_dict
        features, cache = None, one_cache(cache, past_key_values)
        pixel_values = self._not_cached(pixel_values, cache, input_ids, inputs_embeds)
        if pixel_values is not None:
            features = self._encode(pixel_values, proprio)
            inputs_embeds, layout = self._merge(input_ids, inputs_embeds, attention_mask, features)
            input_ids = None
            if layout is not None:
                attention_mask = layout.insert(attention_mask, 1)
                position_ids = layout.insert_positions(position_ids)
                labels = layout.insert(labels, IGNORE_INDEX)
                # Of sequence parallel training; as long as the logits, they count the patches already.
                shifted = kwargs.get("shift_labels")
                if shifted is not None and shifted.shape[1] != layout.is_patch.shape[1]:
                    kwargs["shift_labels"] = layout.insert_shifted(shifted)
        for name, value in (("output_attentions", output_attentions), ("output_hidden_states", output_hidden_states)):
            value = getattr(self.config, name) or None if value is None else value
            if value is not None:  # left to the language model's own config otherwise
                kwargs[name] = value
        outputs = self.language_model(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            labels=labels,
            logits_to_keep=logits_to_keep,
            return_dict=True,
            **{CACHE: cache},
            **kwargs,
        )
        if pixel_values is not None and outputs.get(CACHE) is not None and not torch.compiler.is_compiling():
            outputs[CACHE].image_in_cache = pixel_values.clone()  # callers write the next image into theirs
        output = OpenVLAOutput(
            loss=outputs.loss,
            logits=outputs.logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            projector_features=features if return_dict or output_projector_features else None,
            **{CACHE: outputs.get(CACHE)},
        )
        return output if return_dict else output.to_tuple()

    # Actions ----------------------------------------------------------------------------------------------------------

    _check_unnorm_key = staticmethod(resolve_unnorm_key)  # published name

    def get_action_dim(self, unnorm_key: str | None = None) -> int:
        """Numbers in one action of a dataset."""
        return len(get_action_stats(self.norm_stats, unnorm_key)["q01"])

    def get_action_stats(self, unnorm_key: str | None = None) -> dict[str, Any]:
        """Action statistics of a dataset."""
        return get_action_stats(self.norm_stats, unnorm_key)

    @torch.inference_mode()
    def predict_action(
        self,
        image=None,
        instruction=None,
        unnorm_key: str | list[str] | None = None,
        *,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        state: Any = None,
        committed: Any = None,
        draft: Any = None,
        constrained: bool = True,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        return_dict: bool = False,
        return_distributions: bool = False,
        **options,
    ) -> np.ndarray | ActionPrediction:
        """Predict one action, or a batch of them.

        Two forms: `predict_action(image, instruction)` with raw images and instructions (lists for a batch), or the
        published `predict_action(**processor(prompt, image))`.

        Args:
            image: Anything `load_image` reads, or `{camera: image}`, of which the model takes its `camera_names`; for a
                batch a list of such. A 2-D integer tensor, or whatever comes with `pixel_values`, is taken as
                `input_ids`, the first argument of the published form.
            instruction: What to do, for example "open the drawer"; one string for each image. See `format_prompt`.
            unnorm_key: Dataset whose statistics give the action its units; one, or one per sample. May be left out
                where the model knows only one dataset.
            state: (S,) or (batch, S) state of the robot in the units of the dataset, of a model that sees it.
            input_ids, attention_mask, pixel_values: The published form, as tensors, arrays or lists.
            committed: (n, A) or (batch, n, A) in the units of the dataset: the first n actions of the chunk, which are
                decided already (they are executed while the model thinks). They come back as they are, the rest of the
                chunk continues them.
            draft: Guesses of the tokens to come, from the first of the chunk on: `token_ids` of an earlier prediction,
                or any ids that the model knows, as many as there are; for a batch one for each sample. What it does
                not hold is guessed to be the middle of its range ([]: all). Each that is right, and all before it,
                saves a pass of the language model; none changes a token (half precision: but where two are equal up
                to its rounding). None: no guesses. The library's own steps do not look at it. Not with `do_sample`.
            constrained: Choose among action tokens only. False: among the complete vocabulary, as the published code;
                text tokens are then clipped to the nearest bin.
            do_sample, temperature, top_k, top_p, generator: Sample instead of taking the most probable token.
            return_dict: Return an `ActionPrediction` with tokens, probabilities and entropies.
            return_distributions: With `token_distributions` in it, what each token was chosen from.
            options: Of `generate`, as scripts written against the original pass them (`use_cache`, `max_new_tokens`,
                `generation_config`, ...): taken where they ask for what is done here anyway, else refused.

        Returns:
            float64 array (action_dim,) in the units of the dataset, or (batch, action_dim) for a list of images or more
            than one prompt; (K, action_dim) or (batch, K, action_dim) of a model that predicts chunks of K steps. The
            same in train mode, which is left for the time of the prediction, and from several threads at once.

        Raises:
            ValueError: Before any compute, if an input is missing, empty, not finite, too long or of a wrong count, or
                an option is unknown; after it, if the model computed something that is not finite.
            KeyError, FileNotFoundError: If `unnorm_key` is unknown, or an image is a path that does not exist.
        """
        check_flags(constrained=constrained, return_dict=return_dict, return_distributions=return_distributions)
        self._check_table()
        self._check_has_values()
        is_ids = isinstance(image, torch.Tensor) and image.ndim == 2 and image.dtype == torch.long
        if input_ids is None and image is not None and (is_ids or pixel_values is not None):
            image, input_ids = None, image
            if isinstance(instruction, str) and unnorm_key is None:
                instruction, unnorm_key = None, instruction

        # 1. Prompts and pixels
        if input_ids is None:
            if pixel_values is not None:
                raise ValueError("pixel_values without input_ids: give both, or a raw image and an instruction.")
            with stage("preprocessing"):
                single, inputs = process_raw(self.processor, image, instruction)
            input_ids, attention_mask = inputs["input_ids"], inputs["attention_mask"]
            pixel_values = inputs["pixel_values"]
        else:
            if image is not None or instruction is not None:
                raise ValueError("Give either a raw image and an instruction, or input_ids and pixel_values, not both.")
            input_ids = as_tensor("input_ids", input_ids)
            single = input_ids.ndim == 2 and len(input_ids) == 1
        if pixel_values is None:
            raise ValueError("No image given (pixel_values is None): OpenVLA acts on what it sees.")
        num_patches, (channels, *size) = self.num_patches, self.vision_backbone.input_shape
        prompts = check_prompts(input_ids, attention_mask, self.config, num_patches)
        pixel_values = as_tensor("pixel_values", pixel_values)
        check_pixel_values(pixel_values, (len(prompts), len(self.camera_names) * channels, *size))

        # 2. What an action is
        keys = read_unnorm_keys(unnorm_key, len(prompts))
        norm_stats, checked = self.norm_stats, self._checked_statistics
        shape = (self.action_chunk, check_same_action_dim(norm_stats, keys, checked))
        names = [resolve_unnorm_key(norm_stats, key) for key in keys]
        modes = units_of(self.normalization, norm_stats or {}, names)
        proprio = read_state(state, self.config, norm_stats, names, modes, self.constant_state)
        decided = read_committed(committed, shape, norm_stats or {}, names, modes, self.prefix_training)
        inputs = ModelInputs(prompts, pixel_values, proprio, decided)
        sampling = read_sampling(
            self.action_head.num_tokens(shape), _keywords(), self.device,
            do_sample=do_sample, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator, **options,
        )  # fmt: skip
        guesses = read_draft(draft, len(prompts), self.config)
        if guesses is not None and (sampling is not None or not self.action_head.takes_drafts):
            what = "do_sample=True" if sampling is not None else f"action_head='{self.config.action_head}'"
            raise ValueError(f"A draft is of the most probable tokens, one after the other: with {what} leave it out.")
        if self.config.empty_token_id is None:
            self.config.empty_token_id = self.processor.empty_token_id

        # 3. Towers, projector, language model, head
        with evaluation_mode(self), one_type(self):
            choice = Choice(constrained in (None, True), sampling, generator, guesses, bool(return_distributions))
            found = self.action_head.actions(self, inputs, shape, choice)

        # 4. Units
        actions = [
            unnormalize_actions(rows, get_action_stats(norm_stats, name, checked), mode, self.action_head.margin)
            for rows, name, mode in zip(found["normalized_actions"], names, modes)
        ]
        predicted = {"actions": np.stack(actions), **dict(found.items())}
        if decided is not None:
            predicted["normalized_actions"][:, : decided.shape[1]] = decided
            predicted["actions"][:, : decided.shape[1]] = as_tensor("committed", committed).double().cpu().numpy()
        if self.action_chunk == 1:
            predicted = {name: value[:, 0] for name, value in predicted.items()}
        if single:
            predicted = {name: value[0] for name, value in predicted.items()}
        return ActionPrediction(**predicted) if return_dict else predicted["actions"]

    def prefix(self, inputs: ModelInputs, layout: PromptLayout) -> Prefix:
        """What the language model reads before it acts. Nothing that is on the device is waited for."""
        device, mask, first = self.device, layout.attention_mask, layout.first_patch
        embeds = self.get_input_embeddings()(layout.input_ids.to(device, non_blocking=True))
        mask = None if mask is None else mask.to(embeds.device, non_blocking=True)
        with stage("vision"):
            features = self._encode(inputs.pixel_values, inputs.proprio)
        finite = are_finite(features).to(device)
        features = features.to(embeds.device, embeds.dtype)
        if first is not None:
            embeds = torch.cat([embeds[:, :first], features, embeds[:, first + features.shape[1] :]], dim=1)
        else:
            places = torch.from_numpy(layout.patches).to(embeds.device, non_blocking=True)
            embeds = embeds.scatter(1, places[..., None].expand(-1, -1, embeds.shape[2]), features)
        return Prefix(embeds, mask, finite)

    def prepare_for_inference(
        self,
        batch_sizes: Sequence[int] = (1,),
        prompt_buckets: Sequence[int] = (32,),
        unnorm_key: str | None = None,
        compile: bool = False,
    ) -> Preparation:
        """Get ready for predictions of certain sizes: memory; graphs of kernels on a CUDA device; on a CPU the order of
        weights that its products read fastest (the same parameters with other strides, until they learn). Other threads
        may predict meanwhile, and not be in `forward` or `generate`. Predictions of other sizes, with `committed`,
        `constrained=False` or under autocast are as without. So are all once the model was moved or cast, or has other
        modules, hooks or adapters: a warning says so; prepare it again.

        Args:
            batch_sizes: Numbers of samples that will be predicted at once.
            prompt_buckets: Numbers of prompt tokens, with the one that ends a prompt; each prompt is padded to the next
                of them, which costs little, and has no graphs beyond the largest.
            unnorm_key: Dataset whose actions will be predicted. May be left out where the model knows only one.
            compile: Kernels by `torch.compile`, seconds for each graph; weights are moved in memory. Where it cannot
                be (heads of one pass are recorded as they are), `reason` says why.

        Raises:
            ValueError: If a size is no whole number of at least 1, or prompts are longer than the model reads.
            MemoryError, KeyError: If there is not so much, or `unnorm_key` is unknown.
        """
        num_tokens = self.action_head.num_tokens((self.action_chunk, self.get_action_dim(unnorm_key)))
        with evaluation_mode(self), one_type(self):
            return prepare(self, batch_sizes, prompt_buckets, num_tokens, compile)

    def action_sequence(
        self, inputs: ModelInputs, num_actions: int, decided: Sequence[Sequence[int]] = (), with_time: bool = False
    ) -> ActionSequence:
        """What the language model reads in one pass, with placeholders for `num_actions` numbers; `decided` are the
        tokens of the first ones of each sample, where they are known."""
        input_ids, attention_mask, first = place_actions(
            inputs.prompts, self.config, self.num_patches + with_time, num_actions, decided
        )
        with stage("vision"):
            return action_sequence(
                self, input_ids, attention_mask, inputs.pixel_values, inputs.proprio, first, num_actions,
                num_committed=len(decided[0]) if decided else 0, with_time=with_time,
            )  # fmt: skip


@cache
def _keywords() -> tuple[str, ...]:
    """Of `predict_action`, for hints at misspelt ones."""
    return tuple(signature(OpenVLAForActionPrediction.predict_action).parameters)


__all__ = ["ActionPrediction", "OpenVLAForActionPrediction", "OpenVLAOutput", "OpenVLAPreTrainedModel"]
