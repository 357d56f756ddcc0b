import pytest
import torch

from sparsemem.slots.alignment import (
    NOBODY,
    core_set,
    hits_per_token,
    last_writers,
    most_weight,
    share_at,
    shift_test,
    weight_of_slots,
)


def test_of_several_updates_the_last_one_wrote_a_slot():
    updates = [torch.tensor([1, 4, 7]), torch.tensor([4, 9])]
    found = last_writers(torch.tensor([[1, 4], [9, 2]]), updates)
    assert found.tolist() == [[0, 1], [1, NOBODY]]
    assert last_writers(torch.tensor([3]), []).tolist() == [NOBODY]


def test_a_slot_belongs_to_the_reader_that_gives_it_the_most_weight():
    weights = torch.tensor([[0.1, 0.0, 0.2, 0.3], [0.4, 0.0, 0.2, 0.1]])
    assert most_weight(weights).tolist() == [1, NOBODY, 0, 0]
    assert most_weight(torch.zeros(0, 2)).tolist() == [NOBODY, NOBODY]


def test_weight_is_added_over_all_reads_of_a_slot():
    slot_ids, weights = torch.tensor([[3, 8, 3], [5, 8, 1]]), torch.tensor([[0.1, 0.2, 0.3], [1.0, 0.5, 9.0]])
    found = weight_of_slots(slot_ids, weights, torch.tensor([3, 4, 8]))
    torch.testing.assert_close(found, torch.tensor([0.4, 0.0, 0.7]))


def test_hits_are_counted_by_token():
    assert hits_per_token(torch.tensor([[1, 2, 2], [3, 4, 5]]), torch.tensor([2, 5])).tolist() == [2, 1]


def test_the_core_set_is_what_every_wording_reads():
    wordings = [torch.tensor([5, 1, 5, 9]), torch.tensor([9, 5]), torch.tensor([2, 5, 9, 9])]
    assert core_set(wordings).tolist() == [5, 9]
    assert core_set([*wordings, torch.tensor([3])]).tolist() == []


def test_the_share_at_marks_is_over_the_hits_of_all_sequences():
    hits = [torch.tensor([3, 0, 1]), torch.tensor([0, 4])]
    marks = [torch.tensor([True, False, False]), torch.tensor([True, False])]
    assert share_at(hits, marks) == 3 / 8
    assert share_at([torch.zeros(2, dtype=torch.int64)], [torch.tensor([True, False])]) is None


def test_hits_at_the_marks_are_no_chance_and_even_hits_are():
    marks = [torch.arange(10) == number for number in range(6)]
    at_marks = [mark.long() * 5 for mark in marks]
    chance, p = shift_test(at_marks, marks, num_shifts=199)
    assert p == 1 / 200
    assert chance == pytest.approx(0.1, abs=0.03)
    even = [torch.ones(10, dtype=torch.int64)] * 6
    assert shift_test(even, marks, num_shifts=199) == (pytest.approx(0.1), 1.0)
    assert shift_test([torch.zeros(3, dtype=torch.int64)], [torch.tensor([True, False, False])]) == (0.0, 1.0)


def test_shifted_spans_keep_their_length():
    # Two neighbours marked, two neighbours hit: a shift catches 0, 1 or 2 of the hits, 0.5 on average.
    hits, marks = torch.tensor([0, 0, 1, 1, 0, 0, 0, 0]), torch.tensor([1, 1, 0, 0, 0, 0, 0, 0]).bool()
    chance, p = shift_test([hits], [marks], num_shifts=4000)
    assert chance == pytest.approx(2 / 8, abs=0.02)
    assert p == 1.0
