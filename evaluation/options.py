"""Where scripts of version 0.1.0 import the options of a recording from; they are in `openvla.options.evaluation`."""

from ..options.evaluation import RecordOptions


__all__ = ["RecordOptions"]
