"""What a resumed run takes from its command line, and not from its checkpoint: the settings of optimizer and schedule."""

from __future__ import annotations

from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers.utils import logging

logger = logging.get_logger(__name__)


class LiveSettings:
    """Taken down before the state of a checkpoint is loaded, and put back afterwards.

    A checkpoint holds learning rate, weight decay, betas ... of the run that wrote it. Left in place, they would be used
    whatever the user asks for now. The moments of the optimizer and the position in the schedule stay the checkpoint's.
    """

    def __init__(self, optimizer: Any, scheduler: Any):
        self.groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        self.base_lrs = list(getattr(scheduler, "base_lrs", []))

    def put_back(self, optimizer: Any, scheduler: Any) -> None:
        for group, live in zip(optimizer.param_groups, self.groups, strict=True):
            group.update({name: value for name, value in live.items() if name != "lr"})
        if not isinstance(scheduler, LambdaLR):
            logger.warning(
                f"{type(scheduler).__name__} has a learning rate of its own in the checkpoint: the run goes on with that one, "
                "whatever --learning_rate says."
            )
            return
        if scheduler.base_lrs == self.base_lrs:
            return
        logger.warning(
            f"The learning rate goes on from {self.base_lrs}, not {scheduler.base_lrs} as in the checkpoint."
        )
        scheduler.base_lrs = self.base_lrs
        factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
        scheduler._last_lr = [base * factor for base, factor in zip(self.base_lrs, factors, strict=True)]
        for group, rate in zip(optimizer.param_groups, scheduler._last_lr, strict=True):
            group["lr"] = rate
