"""Losses: small pure functions by name, what shapes them, and the `Objective` that a run makes of them."""

from ..distributed.ranks import Ranks
from . import anchored, batchwise, likelihood, margin
from .objective import Objective, PairLosses
from .options import LossOptions
from .registry import LOSSES, Loss, register_loss
from .user import load_loss_module

__all__ = [
    "LOSSES",
    "Loss",
    "LossOptions",
    "Objective",
    "PairLosses",
    "Ranks",
    "anchored",
    "batchwise",
    "likelihood",
    "load_loss_module",
    "margin",
    "register_loss",
]
