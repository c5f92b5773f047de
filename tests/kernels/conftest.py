"""What the kernel tests share: the interpreter's process, and the device for `gpu` tests."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from real_parts import missing

from .interpreter import Interpreter

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def interpreted():
    """`interpreted(function, *args, **kwargs)` runs a dispatched function's Triton path under the interpreter."""
    if importlib.util.find_spec("triton") is None:
        missing("Triton")
    interpreter = Interpreter()
    yield interpreter
    interpreter.close()


@pytest.fixture
def cuda():
    """The device of `gpu` tests. CI has none, so this is a skip everywhere."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda")
