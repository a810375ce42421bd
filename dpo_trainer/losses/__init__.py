"""Losses: small pure functions by name, what shapes them, and the `Objective` that a run makes of them."""

from ..distributed.ranks import Ranks
from . import anchored, batchwise, likelihood, margin
from .check import check_loss_arguments
from .objective import Objective, PairLosses
from .registry import LOSSES, Loss, register_loss
from .user import load_loss_module

__all__ = [
    "LOSSES",
    "Loss",
    "Objective",
    "PairLosses",
    "Ranks",
    "anchored",
    "batchwise",
    "check_loss_arguments",
    "likelihood",
    "load_loss_module",
    "margin",
    "register_loss",
]
