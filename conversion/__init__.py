"""Checkpoints of the original's training code <-> Hub folders, folders of OpenVLA-OFT -> Hub folders, Hub folders that
carry their own code, and Hub folders -> graphs that run without torch."""

from .oft import convert, convert_oft_checkpoint
from .onnx_export import export_onnx
from .package import package_checkpoint
from .prismatic import convert_prismatic_checkpoint, export_prismatic_checkpoint
from .quantize import quantize_checkpoint


__all__ = [
    "convert",
    "convert_oft_checkpoint",
    "convert_prismatic_checkpoint",
    "export_onnx",
    "export_prismatic_checkpoint",
    "package_checkpoint",
    "quantize_checkpoint",
]
