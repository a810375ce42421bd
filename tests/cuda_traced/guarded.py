"""The process of the fake device. Imports no torch: the guard must be there before it."""

from __future__ import annotations

import ctypes
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
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return function(**arguments)
