"""The pass of a head that predicts in one (`parallel_openvla`), from a recording.

Shapes: `batch` samples, `hidden` width of the language model.
"""

from dataclasses import dataclass
from typing import Any

import torch

from .inputs_openvla import ModelInputs
from .parallel_openvla import action_sequence
from .recordings_openvla import Recorded
from .stages_openvla import stage
from .vision_openvla import towers_beside


class SequenceGraph(Recorded):
    """Images, prompts and placeholders to hidden states.

    Args:
        batch, tokens: Samples, and tokens of their padded prompts without patches, actions and the end.
        num_actions: Placeholders.
    """

    def __init__(self, model: Any, batch: int, tokens: int, num_actions: int):
        super().__init__(model, batch, tokens + num_actions + 1, num_actions)
        self.first = torch.ones(batch, dtype=torch.long, device=model.device)

        def read_all() -> torch.Tensor:
            with towers_beside(self.beside):
                sequence = action_sequence(
                    model, self.input_ids, self.attention_mask, self.pixels, self.proprio, self.first, num_actions
                )
            return sequence.hidden_states(model.language_model, num_actions)

        self.reading = self.record(read_all, self.stream)
        self.last = self.stream  # where the last prediction was begun

    def fill(
        self, inputs: ModelInputs, input_ids: torch.Tensor, mask: torch.Tensor | None, first: torch.Tensor
    ) -> None:
        """Take a prediction, see `place_actions`: ids (batch, n) and n up to `length`."""
        if self.last is not None:  # the one before may compute still, where another thread has a stream of its own
            current = torch.cuda.current_stream(self.first.device)
            current.wait_stream(self.last)
            self.last = current
        behind = (0, self.length - input_ids.shape[1])
        mask = torch.ones_like(input_ids) if mask is None else mask
        self.input_ids.copy_(torch.nn.functional.pad(input_ids, behind), non_blocking=True)
        self.attention_mask.copy_(torch.nn.functional.pad(mask, behind), non_blocking=True)
        self.first.copy_(first, non_blocking=True)
        self.take(inputs)


@dataclass
class RecordedSequence:
    """As an `ActionSequence`, of a graph that is up to date."""

    graph: SequenceGraph
    inputs: ModelInputs
    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    first: torch.Tensor

    def hidden_states(self, language_model: Any, count: int) -> torch.Tensor:
        """(batch, count, hidden), see `ActionSequence.hidden_states`."""
        assert count == self.graph.num_tokens  # that is what it was looked for with
        with self.graph.lock, stage("answer"):
            self.graph.fill(self.inputs, self.input_ids, self.attention_mask, self.first)
            self.graph.reading.replay()
            return self.graph.reading.output.clone()


__all__ = ["RecordedSequence", "SequenceGraph"]
