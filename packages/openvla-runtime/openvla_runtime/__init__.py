"""OpenVLA without torch: an image and an instruction go in, a robot action comes out.

`openvla export MODEL FOLDER --to onnx` writes what it acts with. Pixels, prompts, tokens, units and checks are those of
the package `openvla`, from the very same files.
"""

from pathlib import Path


if not Path(__file__).with_name("pixels_openvla.py").exists():  # a checkout, at whose root the shared files stand
    __path__.append(str(Path(__file__).resolve().parents[3]))

from .pixels_openvla import load_image
from .policy import OnnxPolicy, Prediction


__version__ = "0.1.0"
__all__ = ["OnnxPolicy", "Prediction", "load_image"]
