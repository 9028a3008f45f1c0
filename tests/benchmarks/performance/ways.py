"""Time alternative implementations of the elementwise operations: python tests/benchmarks/performance ways

The penalty's gradient and a Bernoulli mask, over whole tensors, in pieces of several sizes, and as one kernel by torch.compile
(which is given the work whole, and compiled before the clock starts); zeros put at scattered places; random numbers; zeros held
in place; a layer's product in other types. On the first layer of LeNet-300-100 and on 10 million weights. Arms take turns; a
ratio is to the way that is used, in the same round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lightning_sparse import elementwise, noise, numeric, penalties
from lightning_sparse.elementwise import pieces, shards
from performance import arguments, record, rounds, tables
from performance.jobs import be_quiet

PENALTY, LAM = penalties.LogSum(2.0), 1e-3
SHAPES = {"LeNet-300-100's first layer": (300, 784), "10 million weights": (3163, 3163)}
BATCH = 128
USED = f"pieces of {pieces.CHUNK:,}"
Ways = dict[str, Callable[[], Any]]


def updates(shape: tuple[int, int]) -> Iterator[tuple[str, str, Ways]]:
    """Return operation, current implementation, and all implementations by name."""
    w, g, h = torch.randn(shape) * 0.05, torch.randn(shape), torch.rand(shape)
    yield "penalty's gradient", USED, cut(each, lambda w, g: g.add_(PENALTY.gradient(w), alpha=LAM), w, g)
    draw = noise.random_words(w.numel(), w.device).view(shape)
    compiled = torch.compile(bernoulli, dynamic=True)
    compiled(w, h, draw.float())
    as_floats: Ways = {"torch.compile, of words made floats": lambda: compiled(w, h, draw.float())}
    yield "Bernoulli mask", USED, cut(elementwise.map_chunks, bernoulli, w, h, draw) | as_floats
    where = torch.rand(shape) < 0.5
    zeroing: Ways = {
        "a product with 0 and 1": lambda: w * numeric.outside(where),
        "masked_fill": lambda: w.masked_fill(where, 0.0),
        "where": lambda: torch.where(where, 0.0, w),
    }
    yield "zeros at scattered places", "a product with 0 and 1", zeroing
    yield "a random number a weight", "16-bit words of SFC64", numbers(w)
    yield "zeros that are held", f"bytes, pieces of {shards._CHUNK:,}", holding(w, where)
    x = torch.randn(BATCH, shape[1])
    few, small = x.bfloat16(), w.bfloat16()
    products: Ways = {"float32": lambda: functional.linear(x, w), "bfloat16": lambda: functional.linear(few, small)}
    yield f"a product with {BATCH} samples", "float32", products


def holding(w: Tensor, where: Tensor) -> Ways:
    """Return implementations that set weights outside ``where`` to zero in place."""
    floats = where.to(w.dtype)
    return {
        f"bytes, pieces of {shards._CHUNK:,}": lambda: elementwise.apply_mask_(w, where),
        "bytes, whole": lambda: w.mul_(where.view(torch.uint8)),
        "booleans, whole": lambda: w.mul_(where),
        "floats, whole": lambda: w.mul_(floats),
    }


def bernoulli(w: Tensor, h: Tensor, draw: Tensor) -> Tensor:
    """Compute a calibrated mask from given random words."""
    return noise._scaled_bernoulli(1 / (1 + LAM / (PENALTY.eta_hat(w) * h)), draw)


def numbers(like: Tensor) -> Ways:
    """Return implementations that draw as many numbers as ``like`` has elements."""
    target, generator = torch.empty_like(like), np.random.Generator(np.random.SFC64(0))
    return {
        "16-bit words of SFC64": lambda: noise.random_words(like.numel(), like.device),
        "torch.Tensor.uniform_": target.uniform_,
        "torch.Tensor.normal_": target.normal_,
        "numpy's float32 normals": lambda: generator.standard_normal(like.numel(), dtype=np.float32),
    }


def cut(through: Callable[..., Any], function: Callable[..., Tensor], *tensors: Tensor) -> Ways:
    """Return ``function`` on whole tensors, in chunks of several sizes (by ``through``), and compiled."""
    call = partial(through, function, *tensors)
    sizes = {f"pieces of {size:,}": partial(of_size, size, call) for size in (1 << 14, 1 << 16, 1 << 18, 1 << 20)}
    fused = torch.compile(function, dynamic=True)
    fused(*tensors)
    return {"whole": partial(function, *tensors), **sizes, "torch.compile": partial(fused, *tensors)}


def each(function: Callable[..., Any], *tensors: Tensor) -> None:
    """Make an in-place version."""
    for parts in pieces.chunks(*tensors):
        function(*parts)


def of_size(size: int, call: Callable[[], Any]) -> None:
    """Use chunks of ``size`` elements per thread."""
    before, pieces.CHUNK = pieces.CHUNK, size
    call()
    pieces.CHUNK = before


def timed(call: Callable[[], Any], least: float = 0.02) -> float:
    """Measure seconds per call, over calls that take at least ``least`` seconds in total."""
    start, calls = time.perf_counter(), 0
    while (taken := time.perf_counter() - start) < least:
        call()
        calls += 1
    return taken / calls


def rows(turns: int) -> list[dict[str, Any]]:
    """Return a row for each operation, number of weights and implementation."""
    found = []
    for title, shape in SHAPES.items():
        for what, used, ways in updates(shape):
            times = rounds.measure({name: partial(timed, call) for name, call in ways.items()}, used, turns)
            found += [row(what, title, shape[0] * shape[1], used, line) for line in rounds.lines(rounds.ratios(times, used))]
    return found


def row(what: str, title: str, count: int, used: str, line: Mapping[str, Any]) -> dict[str, Any]:
    """Make a row of nanoseconds per weight."""
    name = f"{line['arm']} (used)" if line["arm"] == used else line["arm"]
    spread = {key: line[key] for key in ("ratio", "low", "high")}
    return {"what": what, "on": title, "way": name, "ns_a_weight": 1e9 * line["value"] / count} | spread


def main() -> None:
    given = arguments.parser(__doc__, "ways").parse_args()
    be_quiet(given.threads)
    elementwise.raise_malloc_thresholds()
    with torch.no_grad():
        found = rows(given.rounds)
    print(tables.aligned(found))
    print(record.write(given.out, arguments.command(), {"rounds": given.rounds, "lam": LAM, "penalty": str(PENALTY)}, found))


if __name__ == "__main__":
    main()
