"""The process of the fake device. Imports no torch: the guard must be there before it."""

from __future__ import annotations

import ctypes
import traceback
import warnings
from collections.abc import Callable
from typing import Any


def begin(guard: str) -> None:
    """Load the guard (guard.cpp), for good."""
    warnings.simplefilter("ignore")
    ctypes.CDLL(guard, mode=ctypes.RTLD_GLOBAL)
    import fake_cuda

    fake_cuda.find_a_gpu()


def call(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """What `function` returns among fake tensors; a RuntimeError with its traceback where it raises."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with FakeTensorMode():
            return function(**arguments)
    except Exception:  # many of torch's cannot be sent to another process
        raise RuntimeError(traceback.format_exc()) from None
