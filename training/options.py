"""Where scripts of version 0.1.0 import the options of a run from; they are in `openvla.options.training`."""

from ..options.training import FinetuneOptions


__all__ = ["FinetuneOptions"]
