"""The table of attention calls that the twin, the interpreted kernel and a GPU are all held to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from lm_telemetry.kernels import reference

if TYPE_CHECKING:
    from collections.abc import Callable

MIN = torch.finfo(torch.float32).min


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Sizes of a call, and what else it is called with."""

    sizes: tuple[int, int, int, int, int, int]  # B, Hq, Hkv, Sq, Sk, D
    dtype: torch.dtype = torch.float32
    causal: bool = True
    logits: float = 1.0  # their standard deviation
    samples: int = 9
    own_positions: bool = False  # each sequence has its own sampled queries
    padding: str = ""  # left or right: a bool mask over keys, and padded queries not kept
    mask: str = ""  # bool, additive, blind (some rows see nothing), broadcast
    bias: bool = False
    own_keys: bool = False  # each sequence's queries begin at another key, as in a static cache
    packed: bool = False  # several sequences in a row, of other lengths in each
    sinks: float | None = None  # what the attention-sink logits are spread around
    induction: bool = False  # keys drawn at random, also hidden ones and none
    more: dict[str, Any] = field(default_factory=dict)


CASES = {
    "one head": Case(sizes=(2, 1, 1, 37, 37, 64)),
    "odd everything": Case(sizes=(5, 3, 3, 123, 123, 33), samples=5),
    "one query": Case(sizes=(1, 2, 2, 1, 1, 32), samples=1),
    "grouped": Case(sizes=(2, 6, 2, 45, 45, 80), samples=40),
    "multi-query": Case(sizes=(1, 5, 1, 123, 123, 96), own_positions=True),
    "half": Case(sizes=(2, 4, 2, 50, 50, 32), dtype=torch.float16),
    "bfloat16": Case(sizes=(2, 4, 2, 70, 70, 128), dtype=torch.bfloat16),
    "bfloat16, 192 wide": Case(sizes=(1, 2, 1, 40, 40, 192), dtype=torch.bfloat16),
    "256 wide": Case(sizes=(1, 2, 2, 35, 35, 256)),
    "decoding": Case(sizes=(2, 4, 2, 1, 77, 64), samples=1, more={"query_offset": 76}),
    "chunk": Case(sizes=(2, 4, 2, 9, 50, 64), more={"query_offset": 41}),
    "sliding window": Case(sizes=(2, 2, 1, 90, 90, 64), induction=True, more={"window": 7}),
    "window while decoding": Case(sizes=(1, 2, 1, 3, 80, 64), samples=3, more={"window": 40, "query_offset": 77}),
    "bidirectional": Case(sizes=(2, 2, 2, 41, 41, 64), causal=False),
    "cross": Case(sizes=(2, 3, 3, 11, 29, 64), causal=False),
    "left padding": Case(sizes=(3, 4, 2, 40, 40, 64), padding="left"),
    "right padding": Case(sizes=(3, 4, 2, 40, 40, 64), padding="right", own_positions=True),
    "bool mask": Case(sizes=(2, 4, 2, 33, 33, 64), mask="bool", own_positions=True),
    "additive mask": Case(sizes=(2, 4, 2, 33, 70, 64), causal=False, mask="additive"),
    "mask of one row": Case(sizes=(2, 4, 2, 33, 33, 64), mask="broadcast"),
    "rows that see nothing": Case(sizes=(2, 2, 2, 33, 33, 64), mask="blind"),
    "position bias": Case(sizes=(2, 3, 3, 20, 31, 64), causal=False, bias=True, logits=3.0),
    "softcap": Case(sizes=(2, 4, 2, 37, 37, 64), logits=60.0, more={"softcap": 30.0}),
    "softcap far off": Case(sizes=(2, 4, 2, 37, 37, 64), more={"softcap": 1000.0}),  # 1 - e^-x would cancel
    "all at once": Case(
        sizes=(2, 4, 2, 33, 65, 48),
        dtype=torch.bfloat16,
        mask="additive",
        bias=True,
        padding="left",
        own_positions=True,
        packed=True,
        sinks=1.0,
        induction=True,
        more={"softcap": 5.0, "window": 50, "query_offset": 32},
    ),
    "static cache": Case(sizes=(3, 4, 2, 9, 50, 64), own_keys=True, induction=True),
    "packed": Case(sizes=(3, 4, 2, 70, 70, 64), packed=True, samples=40, induction=True),
    "packed, one layout": Case(sizes=(2, 2, 2, 90, 90, 32), packed=True, causal=False, more={"window": 20}),
    "sinks": Case(sizes=(2, 4, 2, 37, 37, 64), sinks=0.0, padding="left", induction=True),
    "sinks far above": Case(sizes=(2, 4, 2, 37, 37, 64), sinks=90.0, induction=True),
    "sinks far below": Case(sizes=(2, 4, 2, 37, 37, 64), sinks=-90.0, samples=37),
    "sinks, nothing seen": Case(sizes=(2, 2, 2, 33, 33, 64), sinks=1.0, mask="blind", samples=20),
    "induction": Case(sizes=(2, 6, 2, 45, 45, 80), samples=40, induction=True),
    "induction, masked": Case(
        sizes=(2, 4, 2, 33, 33, 64), mask="bool", own_positions=True, induction=True, more={"window": 12}
    ),
    "linear bias": Case(sizes=(2, 4, 4, 40, 40, 64), bias=True, induction=True),
    "logits of 300": Case(sizes=(2, 2, 1, 64, 64, 64), logits=100.0),
    "logits of 10,000": Case(sizes=(2, 2, 1, 64, 64, 64), logits=3600.0),
}


def build(case: Case, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Queries, keys and the other arguments of a call of `attention_rows`."""
    B, Hq, Hkv, Sq, Sk, D = case.sizes
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    # As a model makes them: projections (B, S, H, D), seen transposed, so heads are not contiguous.
    query = (normal(B, Sq, Hq, D) * case.logits**0.5).to(case.dtype).transpose(1, 2)
    key = (normal(B, Sk, Hkv, D) * case.logits**0.5).to(case.dtype).transpose(1, 2)
    n = min(case.samples, Sq)

    def sample():
        return torch.randperm(Sq, generator=generator)[:n].sort().values

    positions = torch.stack([sample() for _ in range(B)]) if case.own_positions else sample()
    arguments = {"positions": positions, "scale": D**-0.5, "causal": case.causal} | case.more
    masks = []
    if case.padding:
        lengths = torch.randint(Sk // 2, Sk + 1, (B,), generator=generator)
        padded = torch.arange(Sk) < (Sk - lengths)[:, None]  # on the left
        if case.padding == "left":
            arguments["first_key"] = Sk - lengths
        else:
            padded = padded.flip(1)
        masks.append(~padded[:, None, None, :].expand(B, 1, Sq, Sk))
        at = positions.expand(B, n) + arguments.get("query_offset", 0)
        arguments["keep"] = ~padded.gather(1, at.clamp(max=Sk - 1))
    match case.mask:
        case "bool":
            masks.append(torch.rand(B, Hq, Sq, Sk, generator=generator) < 0.7)
        case "blind":
            masks.append((torch.arange(Sq) % 3 > 0)[:, None].expand(Sq, Sk))
        case "broadcast":
            masks.append((torch.arange(Sk) % 5 > 0).expand(1, 1, 1, Sk))
        case "additive":
            hidden = torch.where(torch.rand(B, 1, Sq, Sk, generator=generator) < 0.5, 0.6 * MIN, -torch.inf)
            masks.append(torch.where(torch.rand(B, 1, Sq, Sk, generator=generator) < 0.3, hidden, normal(B, 1, Sq, Sk)))
    if len(masks) == 2:
        both = masks[0] & masks[1] if masks[1].dtype == torch.bool else torch.where(masks[0], masks[1], MIN)
        arguments["mask"] = both
    elif masks:
        arguments["mask"] = masks[0]
    return query, key, arguments | more_arguments(case, n, normal, generator)


def more_arguments(
    case: Case, n: int, normal: Callable[..., torch.Tensor], generator: torch.Generator
) -> dict[str, Any]:
    """Bias, places among the keys, packing, sinks and induction keys of a call with n sampled queries."""
    B, Hq, _, Sq, Sk, _ = case.sizes
    arguments = {}
    if case.bias:
        slopes = 2.0 ** -torch.arange(1.0, Hq + 1)[:, None, None]
        away = (torch.arange(Sq)[:, None] - torch.arange(Sk)).abs()
        arguments["bias"] = -slopes * away if case.causal and not case.mask else normal(1, Hq, Sq, Sk)
    if case.own_keys:
        begins = torch.randint(0, Sk - Sq + 1, (B, 1), generator=generator)
        arguments["own_keys"] = begins + torch.arange(Sq)
    if case.packed:
        rows = B if case.causal else 1
        begins = torch.rand(rows, Sk, generator=generator) < 5 / Sk
        arguments["segments"] = begins.cumsum(1).int()
    if case.sinks is not None:
        arguments["sinks"] = (case.sinks + normal(Hq)).to(case.dtype)
    if case.induction:
        arguments["induction_key"] = torch.randint(-1, Sk, (B, n), generator=generator)
    return arguments


def largest_magnitude(query, key, arguments):
    """The largest sum of magnitudes that makes a finite logit: products, bias and additive mask; or a sink."""
    products = reference.logits(query.abs(), key.abs(), scale=arguments["scale"])
    total = products[products < torch.finfo(torch.float32).max].max()
    for added in (arguments.get("bias"), arguments.get("mask")):
        if added is not None and added.is_floating_point():
            total = total + torch.where(added > MIN / 2, added, 0.0).abs().max()
    sinks = arguments.get("sinks")
    return max(total.item(), 0.0 if sinks is None else sinks.float().abs().max().item())
