"""The modules of a model while it predicts: no dropout, no gradient checkpointing, weights of one type."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from torch import nn


@dataclass
class _Predictions:
    """Predictions that a model is busy with, and its modules that are in train mode otherwise."""

    running: int = 0
    modules: list[nn.Module] = field(default_factory=list)


_PREDICTIONS: WeakKeyDictionary[nn.Module, _Predictions] = WeakKeyDictionary()
_SWITCH = threading.Lock()


def every_module(model: nn.Module) -> list[nn.Module]:
    """The modules of a model, shared ones more than once: `modules()` in a quarter of the time, for what is looked at
    in every prediction."""
    found, waiting = [], [model]
    while waiting:
        module = waiting.pop()
        found.append(module)
        if module._modules:
            waiting += [part for part in module._modules.values() if part is not None]
    return found


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Without dropout and gradient checkpointing, also in train mode, which comes back when the last of the threads
    that predict with the model has finished."""
    with _SWITCH:
        predictions = _PREDICTIONS.setdefault(model, _Predictions())
        predictions.running += 1
        training = [module for module in every_module(model) if module.training]
        predictions.modules += training
        for module in training:
            module.training = False
    try:
        yield
    finally:
        with _SWITCH:
            predictions.running -= 1
            if not predictions.running:
                for module in predictions.modules:
                    module.training = True
                predictions.modules = []


@contextmanager
def one_type(model: nn.Module) -> Iterator[None]:
    """A `ValueError` instead of torch's error where parts of a model that were cast apart do not compute together."""
    try:
        yield
    except RuntimeError as error:
        types = {str(parameter.dtype) for parameter in model.parameters() if parameter.is_floating_point()}
        if len(types) < 2 or not ("dtype" in str(error) or "scalar type" in str(error)):
            raise
        raise ValueError(
            f"The weights of the model are of several types, {', '.join(sorted(types))}, whose parts do not compute "
            f"together ({error}): cast all of them, model.to(torch.bfloat16)."
        ) from error


__all__ = ["evaluation_mode", "every_module", "one_type"]
