"""One peer on the setting of `curvature.py`, in the peer's own environment; prints one JSON line.

python benchmarks/curvature_peer.py pyhessian
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from curvature_setting import batch, gradient_seconds, setting
from torch.nn.attention import SDPBackend, sdpa_kernel


class Logits(torch.nn.Module):
    """The model as tools for classifiers expect it: inputs to logits, the loss outside."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=inputs).logits[:, :-1].transpose(1, 2)


def pyhessian(model: Any, inputs: torch.Tensor) -> float:
    from pyhessian import hessian

    tool = hessian(Logits(model), torch.nn.CrossEntropyLoss(), data=(inputs, inputs[:, 1:]), cuda=False)
    return tool.eigenvalues()[0][0]


def curvlinops(model: Any, inputs: torch.Tensor) -> float:
    from curvlinops import HessianLinearOperator
    from scipy.sparse.linalg import eigsh

    wrapped = Logits(model)
    params = [p for p in wrapped.parameters() if p.requires_grad]
    operator = HessianLinearOperator(wrapped, torch.nn.CrossEntropyLoss(), params, [(inputs, inputs[:, 1:])])
    return float(eigsh(operator.to_scipy(), k=1, which="LA", tol=1e-2, return_eigenvectors=False)[0])


def eigenthings(model: Any, inputs: torch.Tensor, **settings: Any) -> float:
    from hessian_eigenthings import HessianOperator, hf_lm_loss, lanczos

    operator = HessianOperator(model, [batch(inputs)], hf_lm_loss())
    return float(lanczos(operator, k=1, seed=0, **settings).eigenvalues[0])


def cockpit(model: Any, inputs: torch.Tensor) -> float:
    from cockpit.quantities.hess_max_ev import HVPLinearOperator

    loss = model(**batch(inputs)).loss
    return HVPLinearOperator(loss, [p for p in model.parameters() if p.requires_grad]).power_iteration().item()


PEERS = {
    "pyhessian": pyhessian,
    "curvlinops": curvlinops,
    "hessian-eigenthings, defaults": eigenthings,
    "hessian-eigenthings, 20 steps": lambda model, inputs: eigenthings(model, inputs, max_iter=20, which="LA"),
    "cockpit": cockpit,
}


def main(name: str) -> None:
    torch.set_num_threads(1)
    model, _, inputs = setting()
    unit = gradient_seconds(model, inputs)
    found: dict[str, Any] = {"peer": name, "gradient_seconds": unit}
    contexts = {
        "as is": sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]),
        "math": sdpa_kernel(SDPBackend.MATH),
    }
    for label, context in contexts.items():
        start = time.perf_counter()
        try:
            with context:
                value = PEERS[name](model, inputs)
        except Exception as error:  # noqa: BLE001 what a peer raises is the result
            found[label] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
            continue
        found[label] = {"value": float(value), "gradients": (time.perf_counter() - start) / unit}
        break
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
