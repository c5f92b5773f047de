"""Laws of how networks learn, read from the store of an observed run: each is a test of what was captured, and when.

Conserved balance of layers and the curve of a two-layer linear network from saddle to saddle (arXiv 1312.6120), the
coordinate check of maximal update parametrisation (2203.03466), and neural collapse (2008.08186).
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lm_telemetry.queries import connect


class TwoLayers(nn.Module):
    """|W2 W1 x - y|²/2, a mean over points."""

    def __init__(self, w1, w2):
        super().__init__()
        self.w1, self.w2 = nn.Parameter(w1), nn.Parameter(w2)

    def forward(self, x, y):
        return {"loss": ((x @ self.w1.T @ self.w2.T - y) ** 2).sum(1).mean() / 2}


# -- conservation --------------------------------------------------------------------------------------------------


def test_the_balance_of_layers_is_conserved_up_to_the_learning_rate(train, ask, tmp_path):
    """W1W1' - W2'W2 does not change under gradient flow. Steps of length lr break that by lr² each, lr in all."""

    def drift(rate):
        generator = torch.Generator().manual_seed(0)
        shapes = ((8, 6), (4, 8), (64, 6), (6, 4))
        w1, w2, x, map_ = (torch.randn(shape, generator=generator) for shape in shapes)
        model = TwoLayers(0.6 * w1, 0.6 * w2)
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        before = balance(model)
        store = str(tmp_path / str(rate))
        steps = round(4 / rate)
        train(model, {"x": x, "y": x @ map_}, optimizer, steps, store=store, instruments={"parameters": {"every": 1}})
        (row,) = ask(
            connect(store),
            "SELECT sum(CASE WHEN name = 'w1' THEN 1 ELSE -1 END * CAST(norm AS DOUBLE) ** 2) AS captured FROM params "
            f"WHERE step = {steps}",
        )
        return float((balance(model) - before).norm()), row["captured"] - float(before.trace())

    def balance(model):
        w1, w2 = model.w1.detach().double(), model.w2.detach().double()
        return w1 @ w1.T - w2.T @ w2

    coarse, fine = drift(0.01), drift(0.005)
    assert coarse[0] / fine[0] == pytest.approx(2.0, abs=0.1)
    # Its trace is the difference of squared norms, which `params` has.
    assert coarse[1] / fine[1] == pytest.approx(2.0, abs=0.1)


# -- from saddle to saddle -----------------------------------------------------------------------------------------


def largest_eigenvalue(a, s):
    """Of the Hessian of |W2 W1 - diag(s)|²/2 at W1 = W2 = diag(√a), from its blocks of 2 and 4 coordinates."""
    values = []
    for i, (ai, si) in enumerate(zip(a, s, strict=True)):
        values += [3 * ai - si, si - ai]
        for aj, sj in zip(a[i + 1 :], s[i + 1 :], strict=True):
            m, ri, rj = (ai * aj) ** 0.5, ai - si, aj - sj
            # Coordinates W2_ij, W1_ij, W2_ji, W1_ji.
            block = [[aj, m, 0, ri], [m, ai, rj, 0], [0, rj, ai, m], [ri, 0, m, aj]]
            values.append(float(torch.linalg.eigvalsh(torch.tensor(block, dtype=torch.float64))[-1]))
    return max(values)


def test_a_linear_network_learns_mode_by_mode(train, ask, tmp_path):
    """a(t) = s e^(2st) / (e^(2st) - 1 + s/a0), one mode after the other, with the sharpness that belongs to it."""
    s, a0, rate, steps = torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64), 1e-3, 5e-3, 1600
    start = torch.diag(torch.full((3,), a0**0.5, dtype=torch.float64))
    model = TwoLayers(start.clone(), start.clone())
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    batch = {"x": torch.eye(3, dtype=torch.float64) * 3**0.5, "y": torch.diag(s) * 3**0.5}  # X'X/n = 1
    instruments = {"sharpness": {"every": 50}}
    connection = connect(train(model, batch, optimizer, steps, store=str(tmp_path / "s"), instruments=instruments))

    losses = {row["step"]: row["loss"] for row in ask(connection, "SELECT step, loss FROM steps")}
    assert len(losses) == steps
    for step, loss in losses.items():
        growth = torch.exp(2 * s * rate * (step - 1))  # the loss of a step is that before its update
        a = s * growth / (growth - 1 + s / a0)
        # Measured 3.1 lr, by which steps lag behind the flow: 1.6 % of the largest mode, in the derivative of the loss.
        exact = float(((s - a) ** 2).sum() / 2)
        assert loss == pytest.approx(exact, abs=0.02 * float(s[0]) * float((s - a).abs().sum()) + 1e-6)

    sharp = {row["step"]: row["value"] for row in ask(connection, "SELECT step, value FROM edge_of_stability")}
    roots, last = torch.full((3,), a0**0.5, dtype=torch.float64), 0
    for step, value in sharp.items():
        for _ in range(step - last):
            roots = roots + rate * roots * (s - roots**2)  # gradient descent of one mode, exactly
        last = step
        # The tolerance of `sharpness` is 1 %; an unconverged mix of two near eigenvalues may be twice that off.
        assert value == pytest.approx(largest_eigenvalue((roots**2).tolist(), s.tolist()), rel=0.02)
    # From the saddle at 0, whose sharpness is s1, to the minimum, where it is 2 s1.
    assert sharp[1] == pytest.approx(4.0, rel=0.02)
    assert sharp[steps] == pytest.approx(8.0, rel=0.02)


# -- width ---------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """x + D tanh(U x) with D = 0 at the start, so that what the block writes is what training made of it."""

    def __init__(self, width):
        super().__init__()
        self.up, self.down = (nn.Linear(width, width, bias=False) for _ in range(2))
        nn.init.normal_(self.up.weight, std=width**-0.5)
        nn.init.zeros_(self.down.weight)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Residual(nn.Module):
    """Three blocks and a readout, which muP initialises with variance 1 and multiplies by 1/width."""

    def __init__(self, width, *, mup):
        super().__init__()
        self.embed = nn.Linear(16, width, bias=False)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.head = nn.Linear(width, 8, bias=False)
        self.multiplier = 1 / width if mup else 1.0
        nn.init.normal_(self.embed.weight, std=0.25)
        nn.init.normal_(self.head.weight, std=1.0 if mup else width**-0.5)

    def forward(self, x, y):
        stream = self.embed(x)
        for block in self.blocks:
            stream = block(stream)
        return {"loss": nn.functional.cross_entropy(self.head(stream) * self.multiplier, y)}


@pytest.mark.slow
def test_coordinate_check_of_maximal_update_parametrisation(train, ask, tmp_path):
    """Slope of log Δh on log width: 0 under muP, where Adam's rate of hidden matrices goes as 1/width; else not."""
    store = str(tmp_path / "s")
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 16, generator=generator), torch.randint(8, (64,), generator=generator)
    for width in (128, 256, 512, 1024):
        for name in ("mup", "standard"):
            torch.manual_seed(0)
            model = Residual(width, mup=name == "mup")
            hidden = {"params": list(model.blocks.parameters()), "lr": 2e-3 * (128 / width if name == "mup" else 1)}
            outer = {"params": [*model.embed.parameters(), *model.head.parameters()], "lr": 2e-3}
            instruments = {"activations": {"every": 1, "tokens": None}}
            optimizer = torch.optim.Adam([hidden, outer])
            train(
                model, {"x": x, "y": y}, optimizer, 10, store=store, run_id=f"{name}-{width}", instruments=instruments
            )
    rows = ask(
        connect(store),
        """
        SELECT split_part(run_id, '-', 1) AS name, layer, step,
            regr_slope(ln(rms), ln(CAST(split_part(run_id, '-', 2) AS DOUBLE))) AS slope, count(*) AS widths
        FROM layers WHERE site = 'mlp_out' AND step > 1 GROUP BY ALL
        """,
    )
    assert len(rows) == 2 * 3 * 9
    assert {row["widths"] for row in rows} == {4}
    for row in rows:
        if row["name"] == "mup":
            assert abs(row["slope"]) < 0.1  # measured at most .055
        else:
            assert row["slope"] > 0.25  # measured at least .37


# -- neural collapse -----------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """A bias-free ReLU network, its features and its readout."""

    def __init__(self):
        super().__init__()
        layers = [nn.Linear(a, 64, bias=False) for a in (32, 64, 64)]
        self.features = nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())])
        self.head = nn.Linear(64, 4, bias=False)

    def forward(self, x, y):
        return {"loss": nn.functional.cross_entropy(self.head(self.features(x)), y)}


def geometry(model, x, y):
    """NC1: class-distance normalised variance; NC2: largest |cos - (-1/3)| of centred means; NC4: disagreements."""
    with torch.no_grad():
        h = model.features(x)
        answers = model.head(h).argmax(1)
    means = torch.stack([h[y == k].mean(0) for k in range(4)])
    variances = torch.stack([((h[y == k] - means[k]) ** 2).sum(1).mean() for k in range(4)])
    off = ~torch.eye(4, dtype=torch.bool)
    variation = ((variances[:, None] + variances) / (2 * (means[:, None] - means).square().sum(2)))[off].mean()
    centred = nn.functional.normalize(means - h.mean(0), dim=1)
    angle = ((centred @ centred.T)[off] + 1 / 3).abs().max()
    nearest = (h[:, None] - means).square().sum(2).argmin(1)
    return float(variation), float(angle), int((nearest != answers).sum())


@pytest.mark.slow
def test_neural_collapse(train, ask, tmp_path):
    """Features collapse to a simplex of class means. The store sees the balance that comes with it."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(4).repeat_interleave(25)
    x = torch.randn(4, 32, generator=generator)[y] + 0.5 * torch.randn(100, 32, generator=generator)
    torch.manual_seed(0)
    model = Classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-3)
    store, instruments = str(tmp_path / "s"), {"parameters": {"every": 50}}
    train(model, {"x": x, "y": y}, optimizer, 50, store=store, run_id="early", instruments=instruments)
    early = geometry(model, x, y)
    train(model, {"x": x, "y": y}, optimizer, 3000, store=store, run_id="late", instruments=instruments)
    late = geometry(model, x, y)
    assert late[0] < 0.6 * early[0] < 0.01
    assert early[1] > 0.15
    assert late[1] < 0.06  # measured .015 to .035 over three seeds
    assert late[2] == 0
    # At a stationary point with weight decay λ each layer of a homogeneous network has λ|W|² = -<W, dL/dW>, and by
    # Euler's theorem the right side is the same for all: so all layers end with one norm.
    spread = "SELECT max(norm) / min(norm) AS spread FROM params WHERE run_id = '{}' AND step = {}"
    (begin,), (end,) = ask(connect(store), spread.format("early", 1)), ask(connect(store), spread.format("late", 3000))
    assert begin["spread"] > 1.5
    assert end["spread"] == pytest.approx(1.0, abs=0.002)
