"""Where a model runs."""

from typing import Any

from .choices_openvla import check_choice


DEVICES = ("auto", "cpu", "cuda", "mps")


def torch_device(choice: str) -> str:
    """What torch calls the device "auto" (the GPU of CUDA where there is one, else the CPU), "cpu", "cuda", "mps" or
    "cuda:1"; a `ValueError` where there is no such device."""
    import torch

    kind, _, number = choice.partition(":")
    check_choice("device", kind, DEVICES)
    counts = {"cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0}
    counts |= {"mps": int(torch.backends.mps.is_available()), "cpu": 1, "auto": 1}
    if not counts[kind]:
        raise ValueError(f"device={choice!r}: torch finds no GPU it can use here; device=cpu works everywhere.")
    if number and not (kind == "cuda" and number.isdecimal() and int(number) < counts[kind]):
        raise ValueError(f"device={choice!r}: there is no such device, of '{kind}' there are {counts[kind]}.")
    if choice == "auto":
        return "cuda" if counts["cuda"] else "cpu"
    return choice


def synchronize(device: Any) -> None:
    """Wait until a `torch.device` has computed all that it was given, for clocks."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
