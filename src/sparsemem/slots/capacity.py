"""Capacity: how full a pool is, how its reads are spread, and whether updates get in each other's way."""

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sparsemem.slots.usage import PoolUsage

HUBS = 0.01
"""Share of the slots that count as hubs: the most read ones."""

MAX_HUB_SHARE = 0.5
MAX_FIRES = 0.01
MAX_FILL = 0.5
MAX_SHARED_FRACTION = 0.1
"""Rules of thumb, not a fitted law: from here on something should be done."""


@dataclasses.dataclass(frozen=True)
class Capacity:
    """The state of one pool.

    Args:
        num_slots: Slots it has.
        num_written: Slots that hold something that was written.
        num_shared: Slots that two updates or more have written: what the later one wrote, the earlier
            one reads.
        hub_share: Share of the background's reads that go to the most read 1 % of the slots.
        hit_share: Share of the background's reads that find a written slot: how many of its reads the
            mean token finds written.
        fires: Share of tokens of ordinary text to which something learned answers, where it was measured.
    """

    num_slots: int
    num_written: int
    num_shared: int
    hub_share: float
    hit_share: float
    fires: float | None = None

    @property
    def fill(self) -> float:
        """Share of the slots that are written."""
        return self.num_written / self.num_slots


def measure_capacity(
    usage: PoolUsage,
    written: Tensor,
    updates: Sequence[Tensor],
    fires: float | None = None,
) -> Capacity:
    """Measure a pool.

    Args:
        usage: Background usage of the whole pool.
        written: Slots that hold something, distinct.
        updates: Slots each update wrote, distinct within an update.
        fires: As in `Capacity`.
    """
    hit_share = int(usage.reads[written].sum()) / max(1, usage.total_reads)
    return Capacity(
        num_slots=usage.num_slots,
        num_written=len(written),
        num_shared=num_wanted_twice(updates),
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


def recommend(capacity: Capacity) -> tuple[str, str]:
    """Say what to do about a pool: "nothing", "more slots" or "other keys"; and why."""
    shared = capacity.num_shared / max(1, capacity.num_written)
    if capacity.hub_share > MAX_HUB_SHARE:
        return "other keys", (
            f"the most read {HUBS:.0%} of the slots take {capacity.hub_share:.0%} of all reads (limit "
            f"{MAX_HUB_SHARE:.0%}), which leaves few slots of their own to facts; attach anew with more or "
            "other --background, or --keys k_means"
        )
    if capacity.fires is not None and capacity.fires > MAX_FIRES:
        return "more slots", (
            f"something learned answers to {capacity.fires:.1%} of the tokens of ordinary text (limit "
            f"{MAX_FIRES:.0%}); grow it to twice the --num-keys"
        )
    if capacity.fill > MAX_FILL:
        return "more slots", (
            f"{capacity.fill:.0%} of the slots are written (limit {MAX_FILL:.0%}), and new facts find most "
            "of theirs taken; grow it to twice the --num-keys"
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
        f"reads written{fires}, and {shared:.1%} of the written slots are wanted by more than one update"
    )
