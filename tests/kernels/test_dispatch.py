"""The choice between kernel and twin: what is chosen, why, and that Triton is not needed where it is not used."""

from __future__ import annotations

import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

from lm_telemetry.kernels import dispatch
from lm_telemetry.kernels.dispatch import Choice, choose, force
from lm_telemetry.kernels.moments import MAX_WIDTH, moments


def pretend(dtype=torch.float32, device="cuda:0"):
    """What `choose` looks at of a tensor on a device this machine need not have."""
    return SimpleNamespace(dtype=dtype, device=torch.device(device))


@pytest.fixture
def hopper(monkeypatch):
    """A machine with an H100 and Triton, as far as `choose` can tell."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(dispatch, "triton_error", lambda: None)


def test_cpu_takes_the_twin():
    assert choose(torch.zeros(3)) == Choice(
        path="torch", reason="the tensors are on the device type 'cpu', where the twin runs"
    )


def test_other_accelerators_take_the_twin():
    assert choose(torch.zeros(3, device="meta")).path == "torch"


def test_a_gpu_takes_the_kernel(hopper):
    assert choose(pretend(), pretend(torch.bfloat16)) == Choice(
        path="triton", reason="the tensors are on cuda:0 and Triton compiles for it"
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
def test_dtypes_the_kernels_do_not_read(hopper, dtype):
    choice = choose(pretend(), pretend(dtype))
    assert choice.path == "torch"
    assert str(dtype) in choice.reason


def test_old_devices(hopper, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choose(pretend()) == Choice(path="torch", reason="cuda:0 is older than compute capability 8.0")
    monkeypatch.setattr(torch.version, "hip", "6.4")  # whose devices have no such number
    assert choose(pretend()).path == "triton"


def test_without_triton(hopper, monkeypatch):
    monkeypatch.setattr(dispatch, "triton_error", lambda: "Triton cannot be imported (no such module)")
    assert choose(pretend()) == Choice(path="torch", reason="Triton cannot be imported (no such module)")


def test_a_kernel_may_refuse(hopper):
    assert choose(pretend(), refusal="heads are too wide") == Choice(path="torch", reason="heads are too wide")
    with force("triton"), pytest.raises(RuntimeError, match="heads are too wide"):
        choose(pretend(), refusal="heads are too wide")


def test_the_twin_can_be_forced(hopper):
    with force("torch"):
        assert choose(pretend()) == Choice(path="torch", reason="the twin was forced")
    assert choose(pretend()).path == "triton"


def test_the_kernel_cannot_be_forced_onto_a_cpu():
    with force("triton"), pytest.raises(RuntimeError, match="move the tensors to a GPU, or start the process with"):
        choose(torch.zeros(3))


def test_force_ends_with_its_block_and_its_thread():
    seen = []
    with force("triton"):
        with force("torch"):
            assert choose(torch.zeros(3)).reason == "the twin was forced"
        thread = threading.Thread(target=lambda: seen.append(choose(torch.zeros(3)).reason))
        thread.start()
        thread.join()
    assert seen == ["the tensors are on the device type 'cpu', where the twin runs"]


def test_force_knows_two_paths():
    with pytest.raises(ValueError, match="expected 'triton' or 'torch'; got 'cuda'"), force("cuda"):
        pass


def test_the_interpreter_runs_the_kernel_and_keeps_its_limits(interpreted):
    assert interpreted(choose, torch.zeros(3)) == Choice(path="triton", reason="the kernel was forced")
    with pytest.raises(AssertionError, match="wider than the kernel's"):
        interpreted(moments, torch.zeros(1, MAX_WIDTH + 1), out=torch.zeros(9, dtype=torch.float64))


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # importing it raises ImportError
import torch
from lm_telemetry.kernels.attention_rows import attention_rows
from lm_telemetry.kernels.dispatch import interpreting, triton_error
from lm_telemetry.kernels.moments import moments
moments(torch.randn(4, 8), out=torch.zeros(9, dtype=torch.float64))
x = torch.randn(1, 2, 5, 8)
attention_rows(x, x, positions=torch.arange(5), scale=1.0, causal=True)
assert "cannot be imported" in triton_error()
assert not interpreting()
"""


def test_the_twins_work_without_triton():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
