"""Merging an adapter of bfloat16 weights as the original does, in every bit."""

from pathlib import Path

import torch

from openvla.oft_openvla import merge_lora


def test_what_is_added_is_rounded_to_the_type_of_the_adapter():
    """1 + 2^-8 + 2^-17 is nearer to 1 + 2^-7; PEFT 0.11.1 rounds the product to 2^-8 first, and the sum to 1."""
    base = {"x.weight": torch.ones(1, 1, dtype=torch.bfloat16)}
    adapter = {"x.lora_A.weight": torch.ones(2, 1), "x.lora_B.weight": torch.tensor([[2.0**-8, 2.0**-17]])}
    exactly = merge_lora(base, adapter, 1.0, Path())["x.weight"]
    half = {name: tensor.bfloat16() for name, tensor in adapter.items()}
    as_original = merge_lora(base, half, 1.0, Path())["x.weight"]
    assert exactly.dtype == as_original.dtype == torch.bfloat16
    assert exactly.item() == 1 + 2.0**-7 and as_original.item() == 1.0
