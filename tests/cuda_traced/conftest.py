"""`on_cuda(function, **arguments)`: what `function` returns in a process where tensors without data live on "cuda".

The function is a module-level one, its arguments and its result can be pickled. It runs among fake tensors: shapes, dtypes
and devices are those of a run on a GPU, and nothing is computed. See fake_cuda.py for what it can use.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import guarded
import pytest
import torch

from dpo_trainer.scoring.varlen import kernels


@pytest.fixture(scope="session")
def guard(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of the device guard (guard.cpp), compiled in about five seconds."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: tests/gpu")
    if torch.version.cuda or torch.version.hip:
        pytest.skip("torch is built for GPUs and has a guard of its own, which looks for one")
    if not any(kernel.takes(None) for kernel in kernels()):
        pytest.skip("no variable-length kernel: torch >= 2.12 has one")
    torch_files, built = Path(torch.__file__).parent, tmp_path_factory.mktemp("guard") / "guard.so"
    command = ["g++", "-std=c++20", "-O0", "-shared", "-fPIC", f"-I{torch_files}/include", "guard.cpp"]
    command += [f"-L{torch_files}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch_files}/lib", "-o", str(built)]
    try:
        subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no device guard: {getattr(error, 'stderr', error)}"[:400])
    return str(built)


@pytest.fixture(scope="session")
def on_cuda(guard: str) -> Iterator[Callable[..., Any]]:
    """One process for all tests of a session: the guard cannot be taken out of a process again."""
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawned, initializer=guarded.begin, initargs=(guard,)) as process:

        def call(function: Callable[..., Any], **arguments: Any) -> Any:
            return process.submit(guarded.call, function, arguments).result()

        yield call
        process.submit(os._exit, 0)  # the threads of the device that is not there cannot be joined
