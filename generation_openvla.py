"""`generate` of transformers for prompts with an image: plain prompts come back plain.

`predict_action` does not pass here; it decodes by itself.
"""

import copy
from typing import Any

import torch
from transformers import Cache, GenerationMixin

from .inputs_openvla import check_are_tensors, largest_pixel
from .outputs_openvla import CACHE, CACHE_NAMES, one_cache, with_both_names
from .patches_openvla import PatchLayout


class OpenVLAGeneration(GenerationMixin):
    """The part of `OpenVLAForActionPrediction` that `generate` needs."""

    def generate(self, inputs: torch.Tensor | None = None, generation_config=None, **kwargs):
        """As `generate` of every model of the library. Plain prompts come back plain: the patches that are inserted for
        `pixel_values` appear neither in the sequences nor in `max_length`. Beside an image they may be padded on either
        side; scores, states and cache are those of prompts padded on the left."""
        self._check_has_values()
        kwargs["generation_config"] = generation_config
        input_ids = inputs if inputs is not None else kwargs.get("input_ids")
        check_are_tensors(input_ids=input_ids, pixel_values=kwargs.get("pixel_values"))
        if kwargs.get("pixel_values") is not None:
            largest_pixel(kwargs["pixel_values"])  # must be finite
        cache = one_cache(*(kwargs.pop(name, None) for name in CACHE_NAMES))
        if cache is not None:
            kwargs[CACHE] = cache
        order = self._padding_first(input_ids, kwargs, cache)
        if order is None:
            return self._generate(inputs, kwargs)
        for name in ("input_ids", "inputs_embeds", "attention_mask", "position_ids"):
            value = input_ids if name == "input_ids" else kwargs.get(name)
            if value is not None and value.shape[1:2] == order.shape[1:]:
                place = order.to(value.device).view(*order.shape, *[1] * (value.ndim - 2))
                kwargs[name] = value.expand(len(order), *value.shape[1:]).take_along_dim(place, dim=1)
        generated = self._generate(None, kwargs)
        is_tensor = isinstance(generated, torch.Tensor)
        for filled in (cache, None if is_tensor else generated.get(CACHE)):
            if filled is not None and getattr(filled, "order_of_prompts", None) is None:
                filled.order_of_prompts = order
        if input_ids is None:
            return generated
        sequences = generated if is_tensor else generated.sequences  # padding back where it was given
        prompts = input_ids.repeat_interleave(len(sequences) // len(input_ids), dim=0).to(sequences.device)
        sequences = torch.cat([prompts, sequences[:, prompts.shape[1] :]], dim=1)
        if is_tensor:
            return sequences
        generated.sequences = sequences
        return generated

    def _padding_first(self, input_ids: torch.Tensor | None, kwargs: dict[str, Any], cache: Any) -> torch.Tensor | None:
        """The order of tokens in which prompts with an image that are padded on the right are padded on the left, or in
        which those of an earlier call are in the cache: (batch, length). What follows padding is not what follows a
        prompt; of that the library only warns."""
        tokens = kwargs.get("inputs_embeds") if kwargs.get("inputs_embeds") is not None else input_ids
        if tokens is None or tokens.ndim < 2:
            return None
        if isinstance(cache, Cache):
            if cache.get_seq_length():
                order = getattr(cache, "order_of_prompts", None)
                if order is None or tokens.shape[1] < order.shape[1]:
                    return None
                each, rest = divmod(len(tokens), len(order))  # answers of each prompt
                if rest or not each:
                    raise ValueError(
                        f"The cache holds answers to {len(order)} prompts that were padded on the right, and "
                        f"{len(tokens)} are given: give all of them, or pad on the left."
                    )
                order = order.repeat_interleave(each, dim=0)
                more = torch.arange(order.shape[1], tokens.shape[1], device=order.device)
                return torch.cat([order, more.expand(len(order), -1)], dim=1)
            cache.order_of_prompts = None  # it may have been emptied
        mask = kwargs.get("attention_mask")
        if kwargs.get("pixel_values") is None:
            return None
        if mask is None and input_ids is not None and input_ids.shape == tokens.shape[:2]:
            mask = self._find_padding(input_ids, kwargs)
        if mask is None or mask.shape != tokens.shape[:2] or not mask.numel():
            return None
        return None if bool(mask[:, -1].all()) else mask.ne(0).int().argsort(dim=1, stable=True)

    def _generate(self, inputs: torch.Tensor | None, kwargs: dict[str, Any]):
        """`generate` of prompts that are not padded on the right."""
        input_ids = inputs if inputs is not None else kwargs.get("input_ids")
        pixel_values, attention_mask = kwargs.get("pixel_values"), kwargs.get("attention_mask")
        if pixel_values is not None and kwargs.get("inputs_embeds") is not None:
            # Images enter the embeddings here, once; generate keeps count of the merged length.
            embeds, beside_ids = kwargs["inputs_embeds"], False
            if input_ids is not None and input_ids.shape == embeds.shape[:2]:  # they come back before the answer
                beside_ids = True
                attention_mask = self._find_padding(input_ids, kwargs) if attention_mask is None else attention_mask
            features = self._encode(kwargs.pop("pixel_values"), kwargs.pop("proprio", None))
            kwargs["inputs_embeds"], layout = self._merge(None, embeds, attention_mask, features)
            if layout is not None:
                kwargs["attention_mask"] = layout.insert(attention_mask, 1)
                kwargs["position_ids"] = layout.insert_positions(kwargs.get("position_ids"))
                # From lengths the library takes that of embeddings, unless the ids beside them have the same.
                self._lengthen(kwargs, layout.is_patch.shape[1] if beside_ids else self.num_patches)
            return with_both_names(super().generate(inputs, **kwargs))
        if input_ids is None or not self._needs_patches(input_ids, attention_mask, pixel_values, kwargs):
            return with_both_names(super().generate(inputs, **kwargs))

        if attention_mask is None:
            attention_mask = self._find_padding(input_ids, kwargs)
        layout = PatchLayout(attention_mask, input_ids.shape, self.num_patches, device=input_ids.device)
        kwargs["input_ids"] = layout.insert(input_ids, self.config.image_token_id)
        kwargs["attention_mask"] = layout.insert(attention_mask, 1)
        kwargs["position_ids"] = layout.insert_positions(kwargs.get("position_ids"))
        self._lengthen(kwargs, self.num_patches)
        generated = with_both_names(super().generate(**kwargs))
        if isinstance(generated, torch.Tensor):
            return layout.remove(generated)
        generated.sequences = layout.remove(generated.sequences)
        return generated

    def _said(self, name: str, kwargs: dict[str, Any]) -> Any:
        """What is asked for: by an option, else by the config that is given, else by that of the model."""
        configs = (kwargs["generation_config"], self.generation_config)
        found = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
        value = next((value for value in found if value is not None), None)
        return value.tolist() if isinstance(value, torch.Tensor) else value

    def _find_padding(self, input_ids: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """The attention mask of prompts that came without one: padding by its id, as the library finds it, unless that
        is a token of prompts as well."""
        pad, first, ends = (self._said(f"{name}_token_id", kwargs) for name in ("pad", "bos", "eos"))
        of_prompts = (first, *(ends if isinstance(ends, (list, tuple)) else [ends]))
        return torch.ones_like(input_ids) if pad is None or pad in of_prompts else input_ids.ne(pad).long()

    def _lengthen(self, kwargs: dict[str, Any], more: int) -> None:
        """Let the lengths that are asked for, which count no patches, be those of sequences with patches."""
        given = kwargs["generation_config"]
        if given is not None:
            kwargs["generation_config"] = given = copy.deepcopy(given)
        for name in ("max_length", "min_length"):
            if (length := self._said(name, kwargs)) is None:
                continue
            if given is None or kwargs.get(name) is not None:
                kwargs[name] = length + more
            else:  # not beside the config: transformers warns where both speak
                setattr(given, name, length + more)

    def _needs_patches(self, input_ids, attention_mask, pixel_values, kwargs) -> bool:
        """Whether `generate` got all of a plain sequence with an image, or one whose image is in the cache already."""
        if kwargs.get("inputs_embeds") is not None or self._placeholders(input_ids, None) is not None:
            return False
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            return False  # only the tokens that follow those in the cache
        cache = kwargs.get(CACHE)
        # A cache holds less than the complete sequence, unless it holds patches.
        return pixel_values is not None or (cache is not None and cache.get_seq_length() >= input_ids.shape[1])

    def prepare_inputs_for_generation(
        self,
        input_ids,
        past_key_values=None,
        cache=None,
        inputs_embeds=None,
        pixel_values=None,
        is_first_iteration=False,
        **kwargs,
    ):
        # transformers 5.4 does not drop images after the prefill by itself. An image that is already in the cache
        # (generation continued from a cache) must not enter a second time.
        cache = one_cache(cache, past_key_values)
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            inputs_embeds=inputs_embeds,  # named in the signature: generate refuses inputs_embeds without it
            is_first_iteration=is_first_iteration,
            **({} if cache is None else {CACHE: cache}),
            **kwargs,
        )
        prefill = is_first_iteration or not kwargs.get("use_cache", True)
        if prefill:
            model_inputs["pixel_values"] = self._not_cached(
                pixel_values, cache, model_inputs.get("input_ids"), model_inputs.get("inputs_embeds"), must_be=True
            )
        else:
            model_inputs["pixel_values"] = None
        return model_inputs

    def _not_cached(self, pixel_values, cache, input_ids, inputs_embeds, must_be=False):
        """The images of what is read next, or None if they are in the cache, where they must not enter again: a loop
        written against the published code, which did not look at them there, gives them beside every token.

        Args:
            must_be: `generate` continues a prompt whose first tokens are in the cache. Unless placeholders follow, its
                image has to be there as well: it comes right after the first token.

        Raises:
            ValueError: If the cache holds other images, or, where it must, none.
        """
        if pixel_values is None or cache is None or torch.compiler.is_compiling():
            return pixel_values
        held = int(cache.get_seq_length())
        if held == 0 or self._placeholders(input_ids, inputs_embeds) is not None:
            return pixel_values
        if held <= self.num_patches:  # it may have been cut since
            if must_be:
                raise ValueError(
                    f"The cache holds {held} positions of the prompt and no image, which comes right after the first "
                    "one: begin with an empty cache."
                )
            return pixel_values
        seen = getattr(cache, "image_in_cache", None)
        if seen is None:  # filled from embeddings, or by compiled code: nothing says what is in it
            return None if must_be else pixel_values
        if seen.shape != pixel_values.shape or not torch.equal(seen.to(pixel_values), pixel_values):
            raise ValueError(
                "The cache holds another image than pixel_values, and that one would be acted on: begin with an "
                "empty cache, or leave pixel_values out to continue with the image in the cache."
            )
        return None


__all__ = ["OpenVLAGeneration"]
