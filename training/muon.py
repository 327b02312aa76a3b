"""Muon (https://kellerjordan.github.io/posts/muon): updates of matrices are orthogonalized, the rest is AdamW's."""

from fnmatch import fnmatch

import timm
import timm.optim
import torch
from torch import nn


NO_MATRICES = ("*embed_tokens*", "*lm_head*", "*pos_embed*", "*cls_token*", "*reg_token*")  # one row for each entry


def make_muon(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """Updates as large as AdamW's (arXiv 2502.16982), so that learning rates mean the same; AdamW for vectors,
    embeddings and the output layer.

    Raises:
        ValueError: If the installed timm has no Muon.
    """
    if "nmuon" not in getattr(timm.optim, "list_optimizers", list)():  # timm 1.0.9 has neither
        raise ValueError(f"optimizer='muon' is not in timm {timm.__version__}: pip install --upgrade timm.")
    return timm.optim.create_optimizer_v2(
        model, "nmuon", lr=learning_rate, weight_decay=weight_decay, fallback_list=NO_MATRICES
    )


def is_orthogonalized(name: str, shape: torch.Size) -> bool:
    """Whether `make_muon` treats a parameter as a matrix, for which it keeps one number of state for each weight
    (AdamW: two). timm leaves thin ones to AdamW, such as adapters of rank 32 on 11,008 inputs."""
    if len(shape) < 2 or 1 in shape[:2] or any(fnmatch(name, pattern) for pattern in NO_MATRICES):
        return False
    short, long = sorted((shape[0], shape[1:].numel()))
    return short >= 4 and long <= 128 * short
