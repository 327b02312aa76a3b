"""Where a model runs."""

from typing import Any


def torch_device(choice: str) -> str:
    """What torch calls the device "auto" (the GPU of CUDA where there is one, else the CPU), "cpu", "cuda" or "mps"; a
    `ValueError` where there is no such GPU."""
    import torch

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(choice, True):
        raise ValueError(f"device={choice!r}: torch finds no GPU it can use here; device=cpu works everywhere.")
    if choice == "auto":
        return "cuda" if available["cuda"] else "cpu"
    return choice


def synchronize(device: Any) -> None:
    """Wait until a `torch.device` has computed all that it was given, for clocks."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
