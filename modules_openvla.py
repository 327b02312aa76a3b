"""The modules of a model while it predicts: no dropout, no gradient checkpointing, weights of one type."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from operator import itemgetter
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from .forks_openvla import lock_over_forks


COMPILED = "_orig_mod"  # where a module of `torch.compile` holds what it was made of


@dataclass
class _Predictions:
    """Predictions that a model is busy with, and its modules that are in train mode otherwise."""

    running: int = 0
    modules: list[nn.Module] = field(default_factory=list)


_PREDICTIONS: WeakKeyDictionary[nn.Module, _Predictions] = WeakKeyDictionary()
_SWITCH = lock_over_forks()  # taken twice where a model is a part of another one


def _leave_other_threads() -> None:
    """In a fork, which has none of the threads that predicted: models have the mode that those would have left them."""
    for predictions in _PREDICTIONS.values():
        for module in predictions.modules:
            module.training = True
    _PREDICTIONS.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_other_threads)


class Modules:
    """The modules of a model as they were found, shared ones more than once.

    They are looked at in every prediction: to walk through the 1,600 of a 7B takes a millisecond where the wait for a
    GPU has emptied the caches.

    Attributes:
        below: All but the model itself, which must not be held: these are the values of a dictionary that is let go of
            with the model.
        attributes: `__dict__` of each of them.
    """

    def __init__(self, model: nn.Module):
        found, waiting = [], [model]
        while waiting:
            module = waiting.pop()
            found.append(module)
            waiting += [part for part in module._modules.values() if part is not None]
        self.below = found[1:]
        self.attributes = [module.__dict__ for module in self.below]
        # What `torch.compile` makes of a part has the mode of that part, which is among these as well.
        self._modes = [own for own in self.attributes if "training" in own]
        self._parts = [module._modules for module in found]
        self._held = self._all_parts()

    def _all_parts(self) -> list[nn.Module | None]:
        return [*chain.from_iterable([parts.values() for parts in self._parts])]

    def are_those(self) -> bool:
        """Whether no module was replaced, added or taken away since."""
        return self._all_parts() == self._held

    def training(self, model: nn.Module) -> list[nn.Module]:
        """Those in train mode, of the model that they were found in."""
        if not (model.training or any(map(itemgetter("training"), self._modes))):
            return []
        return [module for module in [model, *self.below] if module.training]


_MODULES: WeakKeyDictionary[nn.Module, Modules] = WeakKeyDictionary()


def modules_of(model: nn.Module) -> Modules:
    """The same as before as long as they are those of the model."""
    modules = _MODULES.get(model)
    if modules is None or not modules.are_those():
        modules = _MODULES[model] = Modules(model)
    return modules


def first_parameter(module: nn.Module) -> nn.Parameter | None:
    """The first of its `parameters()`, without the walk through all modules that torch begins for it."""
    for parameter in module._parameters.values():
        if parameter is not None:
            return parameter
    for part in module._modules.values():
        if part is not None and (found := first_parameter(part)) is not None:
            return found
    return None


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Without dropout and gradient checkpointing, also in train mode, which comes back when the last of the threads
    that predict with the model has finished."""
    with _SWITCH:
        predictions = _PREDICTIONS.setdefault(model, _Predictions())
        predictions.running += 1
        training = modules_of(model).training(model)
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


def set_mode(model: nn.Module, mode: bool, switch: Callable[[bool], Any]) -> None:
    """Put a model into train mode or out of it, as `switch` does; while threads predict with it, when the last of them
    has finished."""
    with _SWITCH:
        predictions = _PREDICTIONS.get(model)
        if predictions is not None and predictions.running:
            predictions.modules = [model, *modules_of(model).below] if mode else []
        else:
            switch(mode)


@contextmanager
def between_predictions(model: nn.Module, own: int, weight: object) -> Iterator[bool]:
    """Whether no thread predicts with a model that has a weight, and none begins meanwhile; `own` are predictions of
    the caller with `model`, for which no module has left train mode."""
    with _SWITCH:
        busy = [
            other for other, predictions in _PREDICTIONS.items()
            if predictions.running > (own if other is model else 0) or (other is model and predictions.modules)
        ]  # fmt: skip
        yield not any(part._parameters.get("weight") is weight for other in busy for part in modules_of(other).below)


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """With the parts that `torch.compile` made other modules of in the place of those: tensors have their names."""
    compiled = [
        (parent, name, part)
        for parent in model.modules()
        for name, part in parent._modules.items()
        if part is not None and COMPILED in part._modules
    ]
    try:
        for parent, name, part in compiled:
            parent._modules[name] = part._modules[COMPILED]
        yield
    finally:
        for parent, name, part in compiled:
            if parent._modules.get(name) is part._modules[COMPILED]:  # else PEFT has put a layer of its own there
                parent._modules[name] = part


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


__all__ = [
    "COMPILED",
    "Modules",
    "between_predictions",
    "evaluation_mode",
    "first_parameter",
    "modules_of",
    "one_type",
    "set_mode",
    "uncompiled",
]
