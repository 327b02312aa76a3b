"""How image patches enter a prompt: after its first token, or in the place of placeholders.

Shapes: `batch` samples, `length` prompt tokens, `num_patches` image patches, `hidden` width of the language model.
"""

import torch
from torch import nn


IGNORE_INDEX = -100  # label that the loss skips


class PatchLayout:
    """Where `num_patches` patches stand once they are inserted after the first real token (BOS) of every row.

    Args:
        attention_mask: (batch, length), 0 marks padding on either side; None means no padding.
        shape: (batch, length) of the prompt.
    """

    def __init__(self, attention_mask: torch.Tensor | None, shape: torch.Size, num_patches: int, device):
        batch, length = shape
        if attention_mask is None:
            first = torch.zeros(batch, 1, dtype=torch.long, device=device)
        else:
            first = attention_mask.to(device).ne(0).int().argmax(dim=1, keepdim=True)
        position = torch.arange(length + num_patches, device=device)[None, :]
        offset = position - (first + 1)  # 0 at the first patch
        self.first, self.offset, self.num_patches = first, offset, num_patches
        self.is_patch = (offset >= 0) & (offset < num_patches)  # (batch, length + num_patches)
        text_index = torch.where(offset >= num_patches, position - num_patches, position)
        self.text_index = text_index.masked_fill(self.is_patch, 0)
        # (batch, length): where each text token stands after the insertion
        text = torch.arange(length, device=device)[None, :].expand(batch, -1)
        self.expanded_index = torch.where(text > first, text + num_patches, text)

    def insert(self, values: torch.Tensor | None, fill: float) -> torch.Tensor | None:
        """(batch, length, ...) -> (batch, length + num_patches, ...), `fill` where patches stand; None stays None."""
        if values is None:
            return None
        if values.shape[:2] != self.expanded_index.shape:
            raise ValueError(
                f"Got {tuple(values.shape)} values for prompts of {tuple(self.expanded_index.shape)} tokens: give one "
                "for each token of the plain prompt, those of the patches are added."
            )
        values, is_patch, index = values.to(self.is_patch.device), self.is_patch, self.text_index
        if values.ndim == 3:
            is_patch, index = is_patch[..., None], index[..., None].expand(-1, -1, values.shape[-1])
        return values.gather(1, index).masked_fill(is_patch, fill)

    def insert_shifted(self, labels: torch.Tensor) -> torch.Tensor:
        """The same for labels that stand one position early, (batch, length)."""
        first, last = torch.full_like(labels[:, :1], IGNORE_INDEX), labels[:, -1:].to(self.is_patch.device)
        inserted = self.insert(torch.cat([first, labels[:, :-1]], dim=1), IGNORE_INDEX)
        assert inserted is not None  # labels were given
        return torch.cat([inserted[:, 1:], last], dim=1)

    def insert_positions(self, position_ids: torch.Tensor | None) -> torch.Tensor | None:
        """Position ids of a prompt, (batch or 1, length), with those of the patches; text after them moves up."""
        if position_ids is None:
            return None
        if position_ids.shape[-1] != self.expanded_index.shape[1]:
            raise ValueError(
                f"position_ids {tuple(position_ids.shape)} for prompts of {tuple(self.expanded_index.shape)} tokens: "
                "give those of the plain prompt, the patches get theirs."
            )
        position_ids = position_ids.to(self.is_patch.device).expand(len(self.is_patch), -1)
        moved_up = position_ids.gather(1, self.text_index) + self.num_patches * (self.offset >= self.num_patches)
        return torch.where(self.is_patch, position_ids.gather(1, self.first) + 1 + self.offset, moved_up)

    def remove(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Sequences that begin with an expanded prompt, without the patches. Rows may be repeated (beams, samples)."""
        batch = len(self.expanded_index)
        expanded = self.is_patch.shape[1]
        index = self.expanded_index.repeat_interleave(len(token_ids) // batch, dim=0).to(token_ids.device)
        return torch.cat([token_ids[:, :expanded].gather(1, index), token_ids[:, expanded:]], dim=1)


def find_placeholders(
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    num_patches: int,
    image_token_id: int,
    embeddings: nn.Module,
) -> torch.Tensor | None:
    """(batch, length) mask of the placeholders an expanded prompt holds, None for a plain prompt."""
    prompt = input_ids if input_ids is not None else inputs_embeds
    if prompt is None or prompt.shape[1] < num_patches:
        return None
    if input_ids is not None:
        is_image = input_ids == image_token_id
    else:
        # Filled on the device: a copy from the host cannot be captured in a CUDA graph.
        token_id = torch.full((), image_token_id, dtype=torch.long, device=prompt.device)
        is_image = (inputs_embeds == embeddings(token_id)).all(-1)
    has_patches = is_image.sum(dim=1) >= num_patches
    mixed = f"Some rows hold {num_patches} image placeholders, others do not: give every row the placeholders, or none"
    if torch.compiler.is_compiling():
        # While a graph is captured values cannot be looked at: a prompt this long is taken as expanded, and the
        # graph fails on a plain one. torch has no public assertion on values inside a graph (2.6 to 2.15).
        torch._assert_async(has_patches.all(), mixed)
    elif not bool(has_patches.any()):
        return None
    elif not bool(has_patches.all()):
        raise ValueError(f"{mixed}.")
    # An unused id may still turn up in generated text; only the first ones stand for patches.
    return is_image & (is_image.cumsum(dim=1) <= num_patches)


__all__ = ["IGNORE_INDEX", "PatchLayout", "find_placeholders"]
