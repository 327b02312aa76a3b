"""One pass for all actions: every token sees every other, and what stands before a placeholder is the answer for it.

The sequence of OpenVLA-OFT (arXiv 2502.19645): the first token, image patches of every camera, the state, the time of a
diffusion, the other tokens of the prompt, K * A placeholders, the end. The embeddings of placeholders are zero, or what
the head puts there, or those of actions that are decided already. Shapes: `batch` samples, `length` tokens and patches,
`hidden` width of the language model.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import create_bidirectional_mask

from .patches_openvla import PatchLayout
from .quantized_linear_openvla import type_of_inputs
from .stages_openvla import stage


@dataclass
class ActionSequence:
    """What the language model reads in one pass.

    inputs_embeds: (batch, length, hidden), rows padded on the right, zero where actions stand.
    attention_mask: (batch, length), 0 marks padding; None without any.
    first: (batch,) position of the first placeholder.
    time: Position of the time token, the same in every row; None without one.
    """

    inputs_embeds: torch.Tensor
    attention_mask: torch.Tensor | None
    first: torch.Tensor
    time: int | None = None

    def hidden_states(
        self,
        language_model: Any,
        count: int,
        actions: torch.Tensor | None = None,
        time: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(batch, count, hidden) after the last norm, of the `count` positions from the one before the first
        placeholder on: each is the answer for the placeholder after it.

        Args:
            actions: (batch, n, hidden) for the first n placeholders.
            time: (batch or 1, hidden) for the time token.
        """
        embeds = self.inputs_embeds
        if actions is not None:
            embeds = embeds.scatter(1, self._places(self.first, actions.shape[1]), actions.to(embeds.dtype))
        if time is not None:
            assert self.time is not None  # the sequence was made with a place for it
            embeds = embeds.index_copy(
                1, torch.tensor([self.time], device=embeds.device), time.to(embeds).expand(len(embeds), -1)[:, None]
            )
        with stage("prefill"):
            hidden = bidirectional(language_model, embeds, self.attention_mask)
        return hidden.gather(1, self._places(self.first - 1, count).to(hidden.device))

    def _places(self, first: torch.Tensor, count: int) -> torch.Tensor:
        """(batch, count, hidden) indices of `count` positions from `first` on."""
        places = first[:, None] + torch.arange(count, device=first.device)
        return places[..., None].expand(-1, -1, self.inputs_embeds.shape[2])


def action_sequence(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    pixel_values: torch.Tensor,
    proprio: torch.Tensor | None,
    first: torch.Tensor,
    count: int,
    *,
    num_committed: int | torch.Tensor = 0,
    with_time: bool = False,
    film_padding: bool = False,
) -> ActionSequence:
    """The sequence of a batch, images and state encoded.

    Args:
        model: An `OpenVLAForActionPrediction`.
        input_ids: (batch, length) plain prompts with `count` placeholders and the end after them, padded on the right.
        first: (batch,) index of the first placeholder of each.
        num_committed: How many of them, at the beginning, (batch, 1) or one number, stand for actions that are decided
            already: they keep the embeddings of their tokens.
        with_time: Whether a time token follows the state.
        film_padding: Padding counts as words of the prompt for FiLM, as in the original's training; its evaluation has
            none.
    """
    input_ids, first = input_ids.to(model.device), first.to(model.device)
    embeds = model.get_input_embeddings()(input_ids)
    position = torch.arange(input_ids.shape[1], device=embeds.device)[None]
    is_action = (position >= first[:, None]) & (position < first[:, None] + count)
    condition = None
    if model.config.use_film:
        words = ~is_action
        if attention_mask is not None and not film_padding:
            words &= attention_mask.to(words.device).bool()
        condition = (embeds * words[..., None]).sum(dim=1) / words.sum(dim=1, keepdim=True)
    features = model._encode(pixel_values, proprio, condition)
    time = None
    if with_time:
        time = features.shape[1] + 1  # after the first token and all features
        features = torch.cat([features, torch.zeros_like(features[:, :1])], dim=1)
    layout = PatchLayout(None, input_ids.shape, features.shape[1], device=embeds.device)
    open_places = is_action & (position >= first[:, None] + num_committed)
    inserted = layout.insert(embeds.masked_fill(open_places[..., None], 0.0), 0.0)
    assert inserted is not None  # there are embeddings
    embeds = inserted.masked_scatter(layout.is_patch[..., None], features.to(embeds))
    return ActionSequence(embeds, layout.insert(attention_mask, 1), first + features.shape[1], time)


def bidirectional(
    language_model: Any, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None
) -> torch.Tensor:
    """(batch, length, hidden) after the last norm, where every position sees every other but padding.

    Args:
        attention_mask: (batch, length), 0 marks padding.
    """
    decoder = language_model.get_decoder()
    implementation = decoder.config._attn_implementation or "eager"
    batch, length = inputs_embeds.shape[:2]
    mask: Any
    if "flash" in implementation:  # padding is cut out there; nothing but `is_causal` says who sees whom
        mask = attention_mask
    elif "flex" in implementation:
        mask = create_bidirectional_mask(
            config=decoder.config,
            inputs_embeds=inputs_embeds,
            attention_mask=inputs_embeds.new_ones(batch, length, dtype=torch.bool)
            if attention_mask is None
            else attention_mask,
            and_mask_function=_everything,  # with a function of its own the library leaves no mask out
        )
    else:
        # Given in full: the library and its kernels read a missing mask as a causal one.
        seen = inputs_embeds.new_ones(batch, length, dtype=torch.bool) if attention_mask is None else attention_mask
        mask = seen.to(inputs_embeds.device).bool()[:, None, None, :].expand(-1, 1, length, -1)
        if implementation != "sdpa":
            least = torch.finfo(inputs_embeds.dtype).min
            mask = torch.zeros_like(mask, dtype=inputs_embeds.dtype).masked_fill(~mask, least)
    # OPT counts positions by a mask of two axes. All others as they do: RoBERTa does not begin at 0.
    counts = decoder.config.model_type == "opt"
    positions = {"position_ids": torch.arange(length, device=inputs_embeds.device)[None]} if counts else {}
    outputs = decoder(
        inputs_embeds=inputs_embeds,
        attention_mask=mask,
        use_cache=False,
        is_causal=False,
        return_dict=True,
        **positions,
    )
    return outputs.last_hidden_state


def _everything(batch: Any, head: Any, query: Any, key: Any) -> torch.Tensor:
    return query.new_ones((), dtype=torch.bool)


def time_embedding(time: torch.Tensor, width: int) -> torch.Tensor:
    """(batch,) steps of a diffusion -> (batch, width) float32: sines, then cosines, of frequencies from 1 down to
    1 / 10000 (arXiv 2502.19645)."""
    half = width // 2
    frequencies = torch.exp(
        torch.arange(half, device=time.device) * -(torch.log(torch.tensor(10000.0, device="cpu")).item() / (half - 1))
    )
    angles = time.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class NoisyActionProjector(nn.Module):
    """MLP from one number of a noisy action to one position in the embedding space of the language model."""

    def __init__(self, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(1, hidden)
        self.fc2 = nn.Linear(hidden, hidden)

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        """(batch, n) -> (batch, n, hidden)."""
        numbers = numbers[..., None].to(type_of_inputs(self.fc1, numbers.dtype))
        return self.fc2(nn.functional.gelu(self.fc1(numbers)))


__all__ = ["ActionSequence", "NoisyActionProjector", "action_sequence", "bidirectional", "time_embedding"]
