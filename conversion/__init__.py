"""Checkpoints of the original's training code <-> Hub folders, folders of OpenVLA-OFT -> Hub folders, and Hub folders
that carry their own code."""

from .oft import convert, convert_oft_checkpoint
from .package import package_checkpoint
from .prismatic import convert_prismatic_checkpoint, export_prismatic_checkpoint


__all__ = [
    "convert",
    "convert_oft_checkpoint",
    "convert_prismatic_checkpoint",
    "export_prismatic_checkpoint",
    "package_checkpoint",
]
