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


def emulated(device: str, dtype: Any) -> str | None:
    """Why a `torch.dtype` computes slowly on a device, and the way out; None where there are instructions for it.

    Of CPUs, those of AVX-512 with bfloat16, of AMX and of newer Arm compute in half precision. Others convert number by
    number: products of matrices took 6 to 100 times as long as in float32 on one with AVX2.
    """
    import torch

    known = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    asked = getattr(torch.ops.mkldnn, known, None) if known else None
    if torch.device(device).type != "cpu" or asked is None or asked():
        return None
    name = str(dtype).removeprefix("torch.")
    return f"this CPU has no instructions for {name} and computes in it many times slower than in float32"


def rounds_products(device: str) -> bool:
    """Whether products of float32 matrices may keep fewer bits on a kind of device, as
    `torch.set_float32_matmul_precision`, `torch.backends.cuda.matmul.allow_tf32` and their successors ask for."""
    import torch

    backend: Any = torch.backends.cuda if device == "cuda" else torch.backends.mkldnn
    precision = getattr(getattr(backend, "matmul", None), "fp32_precision", None)
    if precision is None:  # before torch 2.9
        return torch.get_float32_matmul_precision() != "highest"
    return precision not in ("none", "ieee")


def synchronize(device: Any) -> None:
    """Wait until a `torch.device` has computed all that it was given, for clocks."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
