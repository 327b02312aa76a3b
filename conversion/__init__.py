"""Checkpoints of the original's training code <-> Hub folders, and Hub folders that carry their own code."""

from .package import package_checkpoint
from .prismatic import convert_prismatic_checkpoint, export_prismatic_checkpoint


__all__ = ["convert_prismatic_checkpoint", "export_prismatic_checkpoint", "package_checkpoint"]
