"""Runs functions of `lm_telemetry.kernels` under Triton's interpreter, in a process of its own.

Triton decides when it is imported whether its functions are compiled or interpreted, so one process cannot do both:
the test process compiles (`test_ahead_of_time`), and this one, started by the `interpreted` fixture, interprets.

Protocol, pickled on stdin and stdout: (module, function, args, kwargs) -> (result, None) or (None, error text).
"""

from __future__ import annotations

import importlib
import os
import pickle
import subprocess
import sys


class Interpreter:
    """The process, as the tests see it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        )

    def __call__(self, function, *args, **kwargs):
        """`function` of these arguments, its Triton path interpreted. Arguments come back changed only as results."""
        pickle.dump((function.__module__, function.__qualname__, args, kwargs), self._process.stdin)
        self._process.stdin.flush()
        result, error = pickle.load(self._process.stdout)
        if error is not None:
            raise AssertionError(f"under the interpreter, {function.__qualname__} raised {error}")
        return result

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def serve() -> None:
    """Answer until stdin closes. What kernels print goes to stderr."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    from lm_telemetry.kernels.dispatch import force

    _let_scalars_be_loop_bounds()
    while True:
        try:
            module, name, args, kwargs = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            with force("triton"):
                answer = (getattr(importlib.import_module(module), name)(*args, **kwargs), None)
        except Exception as error:  # noqa: BLE001  -- it is the test process that must hear of it
            answer = (None, repr(error))
        pickle.dump(answer, answers)
        answers.flush()


def _let_scalars_be_loop_bounds() -> None:
    """Triton 3.6 holds scalars as arrays of one entry, which NumPy since 2.4 does not take for integers."""
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched


if __name__ == "__main__":
    serve()
