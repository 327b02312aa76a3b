"""HEADS: how actions come out of the language model, one object each that knows its targets, its loss and its actions.

The shape of an action, (K, A), K steps of A numbers each, comes from the model (`config.action_chunk`) and the
statistics of a dataset. A head that has weights is a torch module, and its weights are those of the model.
"""

from typing import Any

import torch

from .action_tokenizer import ActionTokenizer
from .choices_openvla import check_choice
from .configuration_openvla import OpenVLAConfig
from .parallel_heads_openvla import DiffusionHead, ParallelTokenHead, RegressionHead
from .token_head_openvla import Comparison, TokenHead


HEADS: dict[str, Any] = {
    "tokens": TokenHead,
    "parallel_tokens": ParallelTokenHead,
    "l1_regression": RegressionHead,
    "diffusion": DiffusionHead,
}


def make_head(config: OpenVLAConfig, tokenizer: ActionTokenizer | None = None) -> Any:
    """The head that `config.action_head` names, with weights at random if it has some.

    Args:
        tokenizer: Default: of the vocabulary that `config` describes.
    """
    check_choice(
        "action_head",
        config.action_head,
        HEADS,
        "One of your own: import what puts it into HEADS first (openvla --import MODULE).",
    )
    tokenizer = tokenizer or ActionTokenizer(config.action_vocab_size, config.n_action_bins)
    return HEADS[config.action_head](tokenizer, config)


def head_without_weights(config: OpenVLAConfig, tokenizer: ActionTokenizer | None = None) -> Any:
    """The same for what is done outside the model, in collator, trainer and plan: targets, loss, comparison."""
    with torch.device("meta"):
        return make_head(config, tokenizer)


__all__ = [
    "HEADS",
    "Comparison",
    "DiffusionHead",
    "ParallelTokenHead",
    "RegressionHead",
    "TokenHead",
    "head_without_weights",
    "make_head",
]
