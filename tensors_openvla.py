"""Tensors where torch may not be there: a program that never imported it has none. The standard library alone."""

import sys
from typing import Any


def is_tensor(value: Any) -> bool:
    """Whether it is a torch tensor."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


__all__ = ["is_tensor"]
