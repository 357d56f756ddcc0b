import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemem.slots.ranking import RANKINGS, kl, tf, tf_idf
from sparsemem.slots.selection import select_slots
from sparsemem.slots.usage import PoolUsage

SLOTS = 20


def background(frequency=None, num_documents=9):
    if frequency is None:
        frequency = [0] * SLOTS
    frequency = torch.tensor(frequency)
    return PoolUsage.of_pool(frequency * 3, frequency, num_documents)


def select(reads, groups=None, usage=None, ranking=tf, top_t=100, weights=None, **options):
    groups = torch.zeros(len(reads), dtype=torch.int64) if groups is None else torch.tensor(groups)
    reads = torch.tensor(reads, dtype=torch.int64)
    weights = torch.ones(len(reads)) if weights is None else torch.tensor(weights)
    chosen = select_slots(reads, weights, groups, usage or background(), ranking, top_t, **options)
    return torch.cat([*chosen.values()]).unique().tolist()


def test_a_heavy_read_counts_more_than_many_light_ones():
    reads, weights = [4, 4, 4, 9, 17], [0.1, 0.1, 0.1, 0.6, 0.2]
    assert select(reads, weights=weights, top_t=2) == [4, 9]
    assert select(reads, weights=weights, top_t=1) == [9]
    assert select(reads, top_t=1) == [4]


def test_the_best_slots_are_chosen_and_come_ascending():
    assert select([9, 9, 9, 4, 4, 17, 17, 17, 17, 2], top_t=2) == [9, 17]


def test_each_group_gets_its_own_best():
    reads = [9, 9, 9, 4, 4, 7, 7, 3]
    groups = [0, 0, 0, 0, 0, 1, 1, 1]
    assert select(reads, groups, top_t=1) == [7, 9]
    assert select(reads, [0] * 8, top_t=1) == [9]


def test_groups_may_share_slots_and_are_named_by_any_number():
    assert select([5, 5, 8, 5, 5, 2], groups=[70, 70, 70, 3, 3, 3], top_t=1) == [5]


def test_a_group_that_reads_more_does_not_take_from_another():
    reads = [1] * 50 + [2] * 40 + [3]
    assert select(reads, [0] * 90 + [1], top_t=2) == [1, 2, 3]


@pytest.mark.parametrize("order", [[3, 8, 11, 19], [19, 11, 8, 3], [8, 3, 19, 11]])
def test_ties_go_to_the_lower_ids_whatever_the_order_of_reads(order):
    assert select(order, top_t=2) == [3, 8]


@pytest.mark.parametrize("ranking", [tf_idf, kl])
def test_nothing_that_scores_zero_or_less_is_chosen(ranking):
    frequency = [0] * SLOTS
    frequency[4] = frequency[9] = 9
    assert select([4, 9, 12, 12, 12], usage=background(frequency), ranking=ranking, top_t=3) == [12]


def test_a_batch_that_reads_only_what_every_document_reads_trains_nothing():
    assert select([4, 4, 9], usage=background([9] * SLOTS), ranking=tf_idf) == []


def test_no_reads_choose_no_slot():
    none = torch.zeros(0, dtype=torch.int64)
    assert select_slots(none, none.float(), none, background(), tf, 5) == {}


def test_only_slots_that_are_read_are_ever_scored():
    scored = []

    def ranking(reads, usage):
        scored.append((reads.tolist(), usage.reads.tolist(), usage.num_slots, usage.total_reads))
        return tf(reads, usage)

    usage = background(list(range(SLOTS)), num_documents=30)
    assert select([7, 3, 7], usage=usage, ranking=ranking) == [3, 7]
    assert scored == [([1, 2], [9, 21], SLOTS, 3 * sum(range(SLOTS)))]


def test_slots_that_too_many_documents_read_are_left_out():
    frequency = list(range(SLOTS))
    usage = background(frequency, num_documents=20)
    reads = [2, 10, 11, 19]
    assert select(reads, usage=usage) == reads
    assert select(reads, usage=usage, max_document_frequency=0.5) == [2, 10]
    assert select(reads, usage=usage, max_document_frequency=0.5, top_t=1) == [2]
    assert select([11, 19, 19], usage=usage, max_document_frequency=0.5, top_t=1) == [19]


@pytest.mark.parametrize("scale", [1, 4])
def test_by_default_common_is_what_is_read_by_much_more_than_the_mean_slot(scale):
    frequency = [10 * scale] * SLOTS
    frequency[2], frequency[3] = 15 * scale, 16 * scale
    frequency[4] = 9 * scale  # the mean stays close to ten
    usage = background(frequency, num_documents=400)
    assert usage.mean_document_frequency == pytest.approx(sum(frequency) / SLOTS / 400)
    assert select([1, 2, 3, 4], usage=usage, max_document_frequency=None) == [1, 2, 4]


@settings(max_examples=60, deadline=None)
@given(
    reads=st.lists(st.tuples(st.integers(0, SLOTS - 1), st.integers(0, 2)), min_size=1, max_size=40),
    frequency=st.lists(st.integers(0, 9), min_size=SLOTS, max_size=SLOTS),
    top_t=st.integers(1, 8),
    name=st.sampled_from(sorted(set(RANKINGS) - {"random"})),  # which falls otherwise on other candidates
)
def test_selection_is_the_top_t_of_the_whole_pool_per_group(reads, frequency, top_t, name):
    usage, ranking = background(frequency), RANKINGS[name]
    slots, groups = zip(*reads, strict=True)
    chosen = select(list(slots), list(groups), usage, ranking, top_t)
    expected = set()
    for group in set(groups):
        counts = torch.bincount(torch.tensor([s for s, g in reads if g == group]), minlength=SLOTS)
        scores = ranking(counts, usage).tolist()
        best = sorted(range(SLOTS), key=lambda slot: (-scores[slot], slot))[:top_t]
        expected |= {slot for slot in best if scores[slot] > 0}
    assert chosen == sorted(expected)
    assert set(chosen) <= set(slots)
