"""Capacity: how full a pool is, how its reads are spread, and how many facts still fit."""

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sparsemem.config import FinetuneConfig
from sparsemem.slots.usage import PoolUsage

HUBS = 0.01
"""Share of the slots that count as hubs: the most read ones."""

MAX_HUB_SHARE = 0.5
MAX_FIRES = 0.01
MAX_TAKEN = 0.5
MAX_SHARED_FRACTION = 0.1
"""Rules of thumb: from here on something should be done."""


@dataclasses.dataclass(frozen=True)
class CapacityLaw:
    """How facts fill a pool: of the slots that a new fact would choose, N facts have taken 1 - exp(-N / F).

    F = exp(a) * slots ** b * slots_per_fact ** c. Facts choose alike, so a pool fills sooner than by
    chance.

    Args:
        a: Of one slot, and one slot a fact.
        b: Of larger pools.
        c: Of more slots a fact.
    """

    a: float
    b: float
    c: float

    def scale(self, num_slots: int, slots_per_fact: float) -> float:
        """Facts after which all but 1 / e of a new fact's slots are taken: F."""
        return math.exp(self.a + self.b * math.log(num_slots) + self.c * math.log(slots_per_fact))

    def taken(self, num_facts: float, num_slots: int, slots_per_fact: float) -> float:
        """Share of a new fact's slots that so many facts have taken."""
        return 1 - math.exp(-num_facts / self.scale(num_slots, slots_per_fact))

    def num_facts(self, taken: float, num_slots: int, slots_per_fact: float) -> float:
        """Facts that have taken such a share."""
        return -math.log(1 - taken) * self.scale(num_slots, slots_per_fact)


LAW = CapacityLaw(a=-0.184, b=0.851, c=-0.687)
"""Fitted by experiments/capacity to SmolLM2-135M with a memory at block 4; its README says how well."""


@dataclasses.dataclass(frozen=True)
class Capacity:
    """The state of one pool.

    Args:
        num_slots: Slots it has.
        num_written: Slots that hold something that was written.
        num_shared: Slots that two updates or more have written: what the later one wrote, the earlier
            one reads.
        num_facts: Facts it holds: as many as the history says, or as it takes to write so many slots.
        slots_per_fact: Slots that a fact gets while there is room: `top_t`.
        has_fitted_keys: Whether the keys were fitted to text, not drawn at random.
        hub_share: Share of the background's reads that go to the most read 1 % of the slots.
        hit_share: Share of the background's reads that find a written slot: how many of its reads the
            mean token finds written.
        fires: Share of tokens of ordinary text to which something learned answers, where it was measured.
    """

    num_slots: int
    num_written: int
    num_shared: int
    num_facts: int
    slots_per_fact: int
    has_fitted_keys: bool
    hub_share: float
    hit_share: float
    fires: float | None = None

    @property
    def fill(self) -> float:
        """Share of the slots that are written."""
        return self.num_written / self.num_slots

    @property
    def taken(self) -> float:
        """Share of a new fact's slots that are taken, by `LAW`."""
        return LAW.taken(self.num_facts, self.num_slots, self.slots_per_fact)

    def room(self, budget: float = MAX_FIRES) -> int:
        """Estimate how many more facts fit.

        That is until half of a new fact's slots are taken, by `LAW`; and where it was measured how much of
        ordinary text fires, until that reaches the budget. Each fact is taken to add as much to it as those
        before did: somewhat too much, as names come again.

        Args:
            budget: Share of the tokens of ordinary text whose predictions may change at all.
        """
        room = LAW.num_facts(MAX_TAKEN, self.num_slots, self.slots_per_fact) - self.num_facts
        if self.fires and self.num_facts:
            room = min(room, self.num_facts * (budget / self.fires - 1))
        return max(0, int(room))


def measure_capacity(
    usage: PoolUsage,
    written: Tensor,
    updates: Sequence[Tensor],
    *,
    num_facts: int = 0,
    slots_per_fact: int = FinetuneConfig().top_t,
    has_fitted_keys: bool = True,
    fires: float | None = None,
) -> Capacity:
    """Measure a pool.

    Args:
        usage: Background usage of the whole pool.
        written: Slots that hold something, distinct.
        updates: Slots each update wrote, distinct within an update.
        num_facts: Facts it holds, as far as the history says.
        slots_per_fact: As in `Capacity`.
        has_fitted_keys: As in `Capacity`.
        fires: As in `Capacity`.
    """
    hit_share = int(usage.reads[written].sum()) / max(1, usage.total_reads)
    return Capacity(
        num_slots=usage.num_slots,
        num_written=len(written),
        num_shared=num_wanted_twice(updates),
        num_facts=max(num_facts, math.ceil(len(written) / slots_per_fact)),
        slots_per_fact=slots_per_fact,
        has_fitted_keys=has_fitted_keys,
        hub_share=hub_share(usage.reads),
        hit_share=hit_share,
        fires=fires,
    )


def hub_share(reads: Tensor, top: float = HUBS) -> float:
    """Share of the reads that go to the `top` share of most read slots; of no reads, 0."""
    num_hubs = math.ceil(top * len(reads))
    return int(reads.topk(num_hubs).values.sum()) / max(1, int(reads.sum()))


def num_wanted_twice(updates: Sequence[Tensor]) -> int:
    """Count the slots that more than one update wrote."""
    if not updates:
        return 0
    _, times = torch.cat(list(updates)).unique(return_counts=True)
    return int((times > 1).sum())


def recommend(capacity: Capacity, budget: float = MAX_FIRES) -> tuple[str, str]:
    """Say what to do about a pool: "nothing", "more slots", "another layer" or "other keys"; and why.

    Args:
        capacity: The pool.
        budget: Share of the tokens of ordinary text whose predictions may change at all.
    """
    shared = capacity.num_shared / max(1, capacity.num_written)
    if capacity.hub_share > MAX_HUB_SHARE:
        hubs = (
            f"the most read {HUBS:.0%} of the slots take {capacity.hub_share:.0%} of all reads (limit "
            f"{MAX_HUB_SHARE:.0%}), which leaves few slots of their own to facts"
        )
        if not capacity.has_fitted_keys:
            return "other keys", f"{hubs}; attach anew with --keys k_means"
        return "another layer", (
            f"{hubs}, although the keys were fitted: what is read there hardly depends on the text; attach "
            "anew at other --layers, or with more --background"
        )
    if capacity.fires is not None and capacity.fires > budget:
        return "more slots", (
            f"something learned answers to {capacity.fires:.1%} of the tokens of ordinary text (budget "
            f"{budget:.1%}); grow it to twice the --num-keys"
        )
    if capacity.taken > MAX_TAKEN:
        return "more slots", (
            f"{capacity.num_facts:,} facts have taken about {capacity.taken:.0%} of the slots that a new one "
            f"would choose (limit {MAX_TAKEN:.0%}); grow it to twice the --num-keys"
        )
    if shared > MAX_SHARED_FRACTION:
        return "more slots", (
            f"{shared:.0%} of the written slots are wanted by more than one update (limit "
            f"{MAX_SHARED_FRACTION:.0%}), so that later ones overwrite earlier ones; grow it to twice the "
            "--num-keys, or teach facts of one subject in one update"
        )
    fires = "" if capacity.fires is None else f", {capacity.fires:.2%} of the tokens of ordinary text fire"
    return "nothing", (
        f"{capacity.fill:.1%} of the slots are written, the mean token finds {capacity.hit_share:.2%} of its "
        f"reads written{fires}, and {shared:.1%} of the written slots are wanted by more than one update; "
        f"about {capacity.room(budget):,} more facts fit"
    )
