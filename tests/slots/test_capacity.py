import dataclasses

import pytest
import torch

from sparsemem.slots.capacity import (
    LAW,
    Capacity,
    CapacityLaw,
    hub_share,
    measure_capacity,
    num_wanted_twice,
    recommend,
)
from sparsemem.slots.usage import PoolUsage

FINE = Capacity(
    num_slots=1000,
    num_written=50,
    num_shared=1,
    num_facts=10,
    slots_per_fact=5,
    has_fitted_keys=True,
    hub_share=0.3,
    hit_share=0.01,
)


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
    found = measure_capacity(usage([1, 6, 2, 1]), torch.tensor([0, 3]), updates, num_facts=3)
    assert found.hit_share == 0.2
    assert (found.num_slots, found.num_written, found.num_shared, found.fill) == (4, 2, 1, 0.5)
    assert found.hub_share == 0.6
    assert (found.num_facts, found.slots_per_fact) == (3, 256)


def test_there_are_no_fewer_facts_than_it_takes_to_write_the_slots():
    written = torch.arange(5)
    assert measure_capacity(usage([1] * 9), written, [], num_facts=1, slots_per_fact=2).num_facts == 3


def test_an_empty_pool_has_room():
    found = measure_capacity(usage([2, 3, 3, 2]), torch.zeros(0, dtype=torch.int64), [])
    assert (found.hit_share, found.num_written, found.slots_per_fact) == (0, 0, 256)
    assert (found.taken, recommend(found)[0]) == (0, "nothing")


@pytest.mark.parametrize(
    ("change", "action", "why"),
    [
        ({}, "nothing", "5.0% of the slots are written"),
        ({"hub_share": 0.6}, "another layer", "take 60% of all reads"),
        ({"hub_share": 0.6, "has_fitted_keys": False}, "other keys", "attach anew with --keys k_means"),
        ({"num_facts": 200}, "more slots", "200 facts have taken about"),
        ({"fires": 0.03}, "more slots", "to 3.0% of the tokens of ordinary text (budget 1.0%)"),
        ({"fires": 0.001}, "nothing", "0.10% of the tokens of ordinary text fire"),
        ({"num_shared": 10}, "more slots", "20% of the written slots are wanted by more than one"),
        ({"num_written": 0, "num_shared": 0, "hit_share": 0.0}, "nothing", "0.0% of the slots"),
    ],
)
def test_one_thing_is_recommended_with_its_reason(change, action, why):
    found, reason = recommend(dataclasses.replace(FINE, **change))
    assert found == action
    assert why in reason


def test_there_is_room_until_half_of_a_new_facts_slots_are_taken():
    full = FINE.num_facts + FINE.room()
    assert LAW.taken(full, FINE.num_slots, FINE.slots_per_fact) == pytest.approx(0.5, abs=0.005)
    assert dataclasses.replace(FINE, num_facts=full + 1).room() == 0
    assert f"about {FINE.room()} more facts fit" in recommend(FINE)[1]


@pytest.mark.parametrize(("fires", "budget", "room"), [(0.005, 0.01, 10), (0.005, 0.005, 0), (0.02, 0.01, 0)])
def test_there_is_room_until_more_of_ordinary_text_fires_than_may(fires, budget, room):
    assert dataclasses.replace(FINE, fires=fires).room(budget) == room
    assert dataclasses.replace(FINE, fires=0.0).room(budget) == FINE.room()


def test_the_law_can_be_read_both_ways():
    law = CapacityLaw(a=0.0, b=1.0, c=-0.5)
    assert law.scale(100, 4) == pytest.approx(50)
    assert law.taken(0, 100, 4) == 0
    assert law.num_facts(law.taken(30, 100, 4), 100, 4) == pytest.approx(30)
