"""The step decay of OpenVLA-OFT's learning rate."""

from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


DECAY = 0.1


def step_decay(optimizer: Optimizer, warmup_steps: int, decay_after: int) -> LambdaLR:
    """The learning rate rises from 0 in `warmup_steps` and is a tenth after `decay_after` updates."""
    return LambdaLR(optimizer, partial(step_factor, warmup_steps=warmup_steps, decay_after=decay_after))


def step_factor(updates: int, warmup_steps: int, decay_after: int) -> float:
    """What the learning rate is multiplied by after so many updates: product of warmup and decay, so that neither
    undoes the other."""
    warmup = updates / warmup_steps if updates < warmup_steps else 1.0
    return warmup * (DECAY if updates >= decay_after else 1.0)
