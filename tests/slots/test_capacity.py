import dataclasses

import pytest
import torch

from sparsemem.slots.capacity import Capacity, hub_share, measure_capacity, num_wanted_twice, recommend
from sparsemem.slots.usage import PoolUsage

FINE = Capacity(num_slots=1000, num_written=50, num_shared=1, hub_share=0.3, hit_share=0.01)


def usage(reads):
    reads = torch.tensor(reads)
    return PoolUsage.of_pool(reads, (reads > 0).long(), 10)


def test_hubs_take_what_the_most_read_slots_take():
    assert hub_share(torch.tensor([1] * 99 + [101])) == 101 / 200
    assert hub_share(torch.tensor([2, 0, 5, 3]), top=0.5) == 8 / 10
    assert hub_share(torch.zeros(10, dtype=torch.int64)) == 0


def test_a_slot_two_updates_wrote_is_counted_once():
    updates = [torch.tensor([1, 2, 3]), torch.tensor([2, 9]), torch.tensor([2, 3])]
    assert num_wanted_twice(updates) == 2
    assert num_wanted_twice(updates[:1]) == num_wanted_twice([]) == 0


def test_a_pool_is_measured_by_what_the_background_reads():
    updates = [torch.tensor([0, 3]), torch.tensor([3])]
    found = measure_capacity(usage([1, 6, 2, 1]), torch.tensor([0, 3]), updates)
    assert found.hit_share == 0.2
    assert (found.num_slots, found.num_written, found.num_shared, found.fill) == (4, 2, 1, 0.5)
    assert found.hub_share == 0.6


def test_an_empty_pool_has_room():
    found = measure_capacity(usage([2, 3, 3, 2]), torch.zeros(0, dtype=torch.int64), [])
    assert (found.hit_share, found.num_written) == (0, 0)
    assert recommend(found)[0] == "nothing"


@pytest.mark.parametrize(
    ("change", "action", "why"),
    [
        ({}, "nothing", "5.0% of the slots are written"),
        ({"hub_share": 0.6}, "other keys", "take 60% of all reads"),
        ({"num_written": 600}, "more slots", "60% of the slots are written"),
        ({"fires": 0.03}, "more slots", "to 3.0% of the tokens of ordinary text"),
        ({"fires": 0.001}, "nothing", "0.10% of the tokens of ordinary text fire"),
        ({"num_shared": 10}, "more slots", "20% of the written slots are wanted by more than one"),
        ({"num_written": 0, "num_shared": 0, "hit_share": 0.0}, "nothing", "0.0% of the slots"),
    ],
)
def test_one_thing_is_recommended_with_its_reason(change, action, why):
    found, reason = recommend(dataclasses.replace(FINE, **change))
    assert found == action
    assert why in reason
