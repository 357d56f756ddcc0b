"""One sparse update against the ways to do it on a dense table.

    python benchmarks/step.py          # a table, beside the committed one
    python benchmarks/step.py --json   # with raw seconds and peaks

An update: choose 500 slots among those that 1,024 tokens read (4 heads, 32 reads each), read, go back,
step. All contenders are given the same reads of the same table, since those of a memory never change while it
learns (training looks them up once per wording); `lookup` is timed beside them. "paper_mask" is
`m * v + v.detach() - (m * v).detach()` over the whole table v (Lin et al. 2025, arXiv:2510.15103),
"dense_mask" multiplies the dense gradient by the mask. Neither is timed where its table does not fit the
memory. `slots_16m_over_65k` compares pools that start at zero, as after `attach`.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from timing import available_bytes, in_turn, parser, publish
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from sparsemem.memory.layer import MemoryLayer, init_memory
from sparsemem.memory.pool import Pool
from sparsemem.slots.ranking import tf_idf
from sparsemem.slots.selection import select_slots
from sparsemem.slots.usage import PoolUsage
from sparsemem.training.optim import SlotOptimizer

NUM_KEYS = {"65k": 256, "262k": 512, "1m": 1024, "16m": 4096}
WIDTHS = (256, 1024)
NUM_TOKENS, NUM_HEADS, TOP_K, TOP_T = 1024, 4, 32, 500
FULL_ROUNDS, ROUNDS = 3, 15
LEARNING_RATE = 0.1
TABLES_HELD = {"paper_mask": 5, "dense_mask_sgd": 3, "dense_mask_adamw": 7, "product_key_memory": 5}
"""Tables of values, gradients, state and intermediates that a contender holds at its peak."""


class Reads:
    """What a layer of random keys reads for random states, and what the gradient of its output is."""

    def __init__(self, num_keys: int, width: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.pool = Pool(num_keys**2, width)
        self.layer = MemoryLayer(
            width, self.pool, num_keys=num_keys, num_heads=NUM_HEADS, top_k=TOP_K, query_dim=16
        )
        init_memory(self.layer, generator)
        self.hidden = torch.randn(NUM_TOKENS, width, generator=generator)
        self.gradient = torch.randn(NUM_TOKENS, width, generator=generator)
        slot_ids, weights = self.lookup()
        self.slot_ids, self.weights = slot_ids.flatten(1), weights.flatten(1)
        reads = torch.randint(0, 3, (num_keys**2,), generator=generator)
        self.usage = PoolUsage.of_pool(reads, reads.clamp(max=2), 1000)
        self.one_group = torch.zeros(self.slot_ids.numel(), dtype=torch.int64)

    @torch.no_grad()
    def lookup(self) -> tuple[Tensor, Tensor]:
        return self.layer.lookup(self.hidden)

    def choose(self) -> Tensor:
        flat = self.slot_ids.flatten(), self.weights.flatten()
        return select_slots(*flat, self.one_group, self.usage, tf_idf, TOP_T)[0]

    def mask(self) -> Tensor:
        mask = torch.zeros(self.pool.num_slots, 1)
        mask[self.choose()] = 1
        return mask


def ours(reads: Reads, optimizer_name: str, base: Tensor | None = None) -> Callable[[], None]:
    pool = Pool(reads.pool.num_slots, reads.pool.value_dim, base)
    optimizer = SlotOptimizer({"pool": pool}, optimizer_name, lr=LEARNING_RATE)

    def step() -> None:
        pool.activate(reads.choose())
        pool.read(reads.slot_ids, reads.weights).backward(reads.gradient)
        optimizer.step()
        optimizer.zero_grad()

    return step


def dense(reads: Reads, table: nn.Parameter, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    def step() -> None:
        mask = reads.mask()
        read = embedding_bag(reads.slot_ids, table, mode="sum", per_sample_weights=reads.weights)
        read.backward(reads.gradient)
        table.grad.mul_(mask)
        optimizer.step()
        optimizer.zero_grad()

    return step


def paper(reads: Reads, table: nn.Parameter) -> Callable[[], None]:
    optimizer = torch.optim.SGD([table], lr=LEARNING_RATE)

    def step() -> None:
        mask = reads.mask()
        masked = mask * table + table.detach() - (mask * table).detach()
        read = embedding_bag(reads.slot_ids, masked, mode="sum", per_sample_weights=reads.weights)
        del masked
        read.backward(reads.gradient)
        optimizer.step()
        optimizer.zero_grad()

    return step


def product_key_memory(reads: Reads) -> Callable[[], None] | None:
    """Make the layer of the registry, which looks up and trains all of itself in each step."""
    try:
        from product_key_memory import PKM
    except ImportError:
        return None
    layer = PKM(reads.pool.value_dim, heads=NUM_HEADS, num_keys=reads.layer.num_keys, topk=TOP_K, dim_head=16)
    optimizer = torch.optim.SGD(layer.parameters(), lr=LEARNING_RATE)

    def step() -> None:
        layer(reads.hidden.unsqueeze(0)).squeeze(0).backward(reads.gradient)
        optimizer.step()
        optimizer.zero_grad()

    return step


def against_dense(size: str, width: int) -> tuple[dict[str, Any], list[str]]:
    """Time the contenders on one table; returns what was measured, and who did not fit."""
    reads = Reads(NUM_KEYS[size], width)
    table_bytes = 4 * width * reads.pool.num_slots
    if TABLES_HELD["dense_mask_sgd"] * table_bytes > available_bytes():
        return {}, list(TABLES_HELD)
    table = nn.Parameter(torch.zeros(reads.pool.num_slots, width).normal_())
    makers: dict[str, Callable[[], Callable[[], None] | None]] = {
        "ours_sgd": lambda: ours(reads, "sgd", table.detach()),
        "ours_adamw": lambda: ours(reads, "adamw", table.detach()),
        "paper_mask": lambda: paper(reads, table),
        "dense_mask_sgd": lambda: dense(reads, table, torch.optim.SGD([table], lr=LEARNING_RATE)),
        "dense_mask_adamw": lambda: dense(reads, table, torch.optim.AdamW([table], lr=LEARNING_RATE)),
        "product_key_memory": lambda: product_key_memory(reads),
    }
    times, left_out = {}, []
    # State of AdamW and the other layer's table live as long as their contender: one pair at a time.
    for name in TABLES_HELD:
        own = "ours_adamw" if name == "dense_mask_adamw" else "ours_sgd"
        if (TABLES_HELD[name] - 1) * table_bytes > available_bytes() or not (other := makers[name]()):
            left_out.append(name)
            continue
        mine = makers[own]()
        measured = in_turn({own: mine, name: other}, FULL_ROUNDS)
        times[name] = {**measured, "table_bytes": table_bytes}
        times[name]["ratio"] = measured[name]["median_seconds"] / measured[own]["median_seconds"]
        del other, mine
        table.grad = None
    return times, left_out


def over_sizes(width: int) -> dict[str, Any]:
    """Time our update, its selection and the lookup at every size, from zero."""
    reads = {size: Reads(num_keys, width) for size, num_keys in NUM_KEYS.items()}
    return {
        "update": in_turn({size: ours(r, "adamw") for size, r in reads.items()}, ROUNDS),
        "choose": in_turn({size: r.choose for size, r in reads.items()}, ROUNDS),
        "lookup": in_turn({size: r.lookup for size, r in reads.items()}, ROUNDS),
    }


def main() -> None:
    args = parser(__doc__).parse_args()
    torch.manual_seed(0)
    sizes = {width: over_sizes(width) for width in WIDTHS}
    tables: dict[str, Any] = {}
    skipped = []
    for size, width in itertools.product(("65k", "262k", "1m"), WIDTHS):
        tables[f"{size}_{width}"], left_out = against_dense(size, width)
        skipped += [f"{name}_{size}_{width}" for name in left_out]
    largest = tables["1m_1024"]
    ratios = {
        "paper_mask_1m_1024": _ratio(largest, "paper_mask"),
        "dense_mask_1m_1024": _ratio(largest, "dense_mask_sgd"),
        "slots_16m_over_65k": _over(sizes[1024], ("update",)),
        "slots_16m_over_65k_with_lookup": _over(sizes[1024], ("update", "lookup")),
        **{f"{name}_{at}": of["ratio"] for at, by in tables.items() for name, of in by.items()},
    }
    for name in ("paper_mask", "dense_mask_sgd"):
        if name in largest:
            peaks = (largest[name][who]["peak_bytes"] for who in ("ours_sgd", name))
            mine, others = peaks
            ratios[f"peak_ours_over_{name}_1m_1024"] = mine / others if mine is not None else None
    publish("step", {"ratios": ratios, "tables": tables, "sizes": sizes, "did_not_fit": skipped}, args)


def _ratio(times: dict[str, Any], name: str) -> float | None:
    return times[name]["ratio"] if name in times else None


def _over(times: dict[str, Any], parts: tuple[str, ...]) -> float:
    large, small = (sum(times[part][size]["median_seconds"] for part in parts) for size in ("16m", "65k"))
    return large / small


if __name__ == "__main__":
    main()
