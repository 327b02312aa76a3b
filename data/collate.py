"""From normalized actions, instructions and images to the batch a training step takes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..action_heads_openvla import TokenHead
from ..action_tokenizer import ActionTokenizer
from ..patches_openvla import IGNORE_INDEX
from ..processing_openvla import OpenVLAProcessor


class ActionCollator:
    """Prompts with what the head learns to answer, labels on that only.

    The training text of action tokens is `prompt + " " + action tokens + </s>`: the prompt, the lone word boundary `▁`
    where the tokenizer has one, the tokens, the end.

    Args:
        processor: Prompts, tokens and pixels of the model in training.
        proprio: Whether the model sees the state of the robot.
        head: That of the model. Default: tokens of 256 bins on the processor's tokenizer.
    """

    def __init__(self, processor: OpenVLAProcessor, head: TokenHead | None = None, proprio: bool = False):
        self.proprio = proprio
        self.processor = processor
        self.tokenizer: Any = processor.tokenizer
        self.head = head or TokenHead(ActionTokenizer(self.tokenizer))
        if self.tokenizer.pad_token_id is None or self.tokenizer.eos_token_id is None:
            raise ValueError("The tokenizer has no pad or end token: set pad_token and eos_token before training.")

    def tokens(
        self, instruction: str, actions: np.ndarray, executed: np.ndarray | None = None
    ) -> tuple[list[int], list[int]]:
        """Token ids and labels of one sample.

        What the expert answers at a step depends on what was done before it, so that the tokens of `executed` are read,
        and those of `actions` learned.

        Args:
            instruction: What to do; "" of a step without words, which is trained on where it was asked for
                (`keep_unlabeled`), as in the original.
            actions: (A,) or (chunk, A) normalized to [-1, 1].
            executed: Of the same shape, what the robot did. Default: the actions.
        """
        prompt = self.processor.prompt_ids(instruction, allow_empty=True)
        answer = self.head.targets(actions, self.tokenizer.eos_token_id)
        read = answer if executed is None else self.head.targets(executed, self.tokenizer.eos_token_id)
        return prompt + read, [IGNORE_INDEX] * len(prompt) + answer

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """A batch padded on the right.

        Args:
            samples: Each with `instruction`, normalized `actions` (A,) or (K, A), and `image` in any form `load_image`
                reads (of several cameras `{camera: image}`), not cropped here: `FrameSamples` or its augmentation did.
                `state` (S,) of a model that sees it; `action_is_pad` (K,) bool where a chunk is padded; `executed`
                (K, A) where the robot did something else than the actions.

        Returns:
            `input_ids`, `labels` (N, length) int64, `attention_mask` (N, length) bool, `pixel_values` (N, channels,
            height, width), images of several cameras one after the other; `proprio` (N, S) float32, normalized states
            of a model that sees them. For a head whose `wants_actions` is True, `actions` (N, K, A) float32,
            normalized; `executed` alike, of one whose `wants_executed` is. Where the chunk of a sample is padded,
            `action_is_pad` (N, K) bool: steps that are not recorded, which the loss leaves out. The key is absent where
            nothing is padded.
        """
        rows = [self.tokens(sample["instruction"], sample["actions"], sample.get("executed")) for sample in samples]
        length = max(len(ids) for ids, _ in rows)
        input_ids = torch.full((len(rows), length), self.tokenizer.pad_token_id)
        labels = torch.full((len(rows), length), IGNORE_INDEX)
        for row, (ids, targets) in enumerate(rows):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            labels[row, : len(ids)] = torch.tensor(targets)
        lengths = torch.tensor([len(ids) for ids, _ in rows])
        images = [sample["image"] for sample in samples]
        pixel_values = self.processor.pixel_values(images, do_center_crop=False, return_tensors="pt")
        return {
            "input_ids": input_ids,
            "attention_mask": torch.arange(length)[None, :] < lengths[:, None],
            "pixel_values": pixel_values,
            "labels": labels,
            **({"proprio": torch.tensor(np.stack([sample["state"] for sample in samples]))} if self.proprio else {}),
            **self._actions(samples),
        }

    def _actions(self, samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """`actions` where the head wants them, and where there is padding `action_is_pad`."""
        actions = np.stack([np.atleast_2d(sample["actions"]) for sample in samples])
        batch: dict[str, torch.Tensor] = {}
        if self.head.wants_actions:
            batch["actions"] = torch.tensor(actions, dtype=torch.float32)
        if self.head.wants_executed:
            executed = [np.atleast_2d(sample.get("executed", sample["actions"])) for sample in samples]
            batch["executed"] = torch.tensor(np.stack(executed), dtype=torch.float32)
        if any("action_is_pad" in sample for sample in samples):
            none = np.zeros(actions.shape[1], dtype=bool)
            batch["action_is_pad"] = torch.tensor(np.stack([sample.get("action_is_pad", none) for sample in samples]))
        return batch
