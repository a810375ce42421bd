"""One answer for all ranks: the main process works it out, and the others receive it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

Answer = TypeVar("Answer")


def same_on_all_ranks(ask: Callable[[], Answer], accelerator: Accelerator) -> Answer:
    """Return what `ask` returns on the main process. All ranks must call.

    Raises:
        ValueError: on all ranks, where `ask` raised a ValueError or an OSError.
    """
    if accelerator.num_processes == 1:
        return ask()
    answer: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            answer[0] = ask()
        except (ValueError, OSError) as error:
            answer[1] = str(error)
    value, problem = broadcast_object_list(answer)
    if problem is not None:
        raise ValueError(problem)
    return value
