import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemem.errors import PoolMismatchError
from sparsemem.memory.attach import pools
from sparsemem.memory.delta import DeltaRecorder, RowChange, SparseDelta
from sparsemem.memory.pool import Pool

SLOTS, WIDTH = 16, 3
EVERY = torch.arange(SLOTS)


def random_rows(slots, seed=0):
    return torch.randn(slots, WIDTH, generator=torch.Generator().manual_seed(seed))


def make_pools(slots=SLOTS, width=WIDTH):
    made = {
        "layer_1": Pool(slots, width),
        "layer_2": Pool(slots, width, torch.randn(slots, width, generator=torch.Generator().manual_seed(3))),
    }
    made["layer_1"].write(torch.tensor([4, 6]), torch.ones(2, width))
    return made


def learn(these, slot_ids, seed):
    """Record and write random rows, as an update does; returns its delta."""
    recorder = DeltaRecorder(these)
    for name, ids in slot_ids.items():
        recorder.record(name, torch.tensor(ids))
        these[name].write(torch.tensor(ids), random_rows(len(ids), seed))
    return recorder.delta()


def make_delta(seed=0):
    return learn(make_pools(), {"layer_1": [6, 1, 9], "layer_2": [0, 15]}, seed)


def rows_of(these):
    return {name: pool.current(EVERY) for name, pool in these.items()}


def same_rows(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(first[name].view(torch.int32), second[name].view(torch.int32)) for name in first
    )


def overlay_of(these):
    return {name: sorted(pool.written_ids.tolist()) for name, pool in these.items()}


def test_recorder_makes_a_delta_of_the_rows_before_and_after():
    these = make_pools()
    before = rows_of(these)
    delta = learn(these, {"layer_1": [6, 1, 9], "layer_2": [0, 15]}, seed=0)
    assert list(delta.changes) == ["layer_1", "layer_2"]
    for name, ids in (("layer_1", [1, 6, 9]), ("layer_2", [0, 15])):
        change = delta.changes[name]
        assert change.slot_ids.tolist() == ids
        assert torch.equal(change.before, before[name][ids])
        assert torch.equal(change.after, these[name].current(torch.tensor(ids)))
        assert change.num_slots == SLOTS
    assert delta.num_slots_trained == 5
    assert delta.num_values == 5 * WIDTH


def test_recorder_keeps_the_rows_before_the_first_change():
    these = make_pools()
    before = rows_of(these)
    recorder = DeltaRecorder(these)
    for seed, ids in enumerate(([4, 2], [2, 4, 5], [4])):
        recorder.record("layer_1", torch.tensor(ids))
        active = these["layer_1"].activate(torch.tensor(ids))
        with torch.no_grad():
            active.copy_(random_rows(len(ids), seed))
    delta = recorder.delta()
    assert list(delta.changes) == ["layer_1"]
    assert delta.changes["layer_1"].slot_ids.tolist() == [2, 4, 5]
    assert torch.equal(delta.changes["layer_1"].before, before["layer_1"][[2, 4, 5]])
    # Rows that are still active count as they are.
    assert torch.equal(delta.changes["layer_1"].after, these["layer_1"].current(torch.tensor([2, 4, 5])))


def test_recorder_without_changes_gives_a_delta_that_does_nothing():
    these = make_pools()
    before = rows_of(these)
    delta = DeltaRecorder(these).delta()
    delta.apply(these)
    assert delta.num_slots_trained == delta.num_values == 0
    assert same_rows(rows_of(these), before)


def test_apply_writes_the_rows_after():
    learned, fresh = make_pools(), make_pools()
    learn(learned, {"layer_1": [6, 1, 9], "layer_2": [0, 15]}, seed=0).apply(fresh)
    assert same_rows(rows_of(fresh), rows_of(learned))


def test_apply_then_invert_is_bit_identical_and_gives_the_memory_back():
    these = make_pools()
    before, overlay = rows_of(these), overlay_of(these)
    delta = make_delta()
    delta.apply(these)
    assert not same_rows(rows_of(these), before)
    delta.invert().apply(these)
    assert same_rows(rows_of(these), before)
    assert overlay_of(these) == overlay


def test_apply_then_invert_gives_bit_identical_logits(attached):
    tokens = torch.randint(4, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    these = pools(attached)
    these["layer_1"].write(torch.arange(0, 64, 3), torch.randn(22, 32))
    with torch.no_grad():
        before = attached(tokens).logits
        recorder = DeltaRecorder(these)
        recorder.record("layer_1", torch.arange(40))
        these["layer_1"].write(torch.arange(40), torch.randn(40, 32))
        after = attached(tokens).logits
        delta = recorder.delta()
        delta.invert().apply(these)
        assert torch.equal(attached(tokens).logits, before)
        delta.apply(these)
        assert torch.equal(attached(tokens).logits, after)
    assert not torch.equal(before, after)


def test_inverting_twice_is_the_same_delta():
    delta = make_delta()
    assert delta.invert().invert().digest == delta.digest
    assert delta.invert().digest != delta.digest


@settings(max_examples=30, deadline=None)
@given(updates=st.lists(st.sets(st.integers(0, SLOTS - 1), min_size=1, max_size=5), max_size=5))
def test_undoing_a_history_in_reverse_restores_every_row(updates):
    these = make_pools()
    states, deltas = [rows_of(these)], []
    for seed, ids in enumerate(updates):
        deltas.append(learn(these, {"layer_1": sorted(ids), "layer_2": sorted(ids)}, seed))
        states.append(rows_of(these))
    for delta in reversed(deltas):
        assert same_rows(rows_of(these), states.pop())
        delta.invert().apply(these)
    assert same_rows(rows_of(these), states.pop())
    assert overlay_of(these) == overlay_of(make_pools())


def test_compose_does_both_at_once():
    these = make_pools()
    first = learn(these, {"layer_1": [6, 1, 9]}, seed=1)
    second = learn(these, {"layer_1": [9, 3, 6], "layer_2": [5]}, seed=2)
    both, fresh = first.compose(second), make_pools()
    both.apply(fresh)
    assert both.changes["layer_1"].slot_ids.tolist() == [1, 3, 6, 9]
    assert same_rows(rows_of(fresh), rows_of(these))
    both.invert().apply(fresh)
    assert same_rows(rows_of(fresh), rows_of(make_pools()))


def test_compose_is_associative():
    these = make_pools()
    a, b, c = (learn(these, {"layer_1": ids}, seed) for seed, ids in enumerate(([6, 1], [1, 2], [6, 2, 8])))
    assert a.compose(b).compose(c).digest == a.compose(b.compose(c)).digest


def test_composing_with_the_inverse_leaves_every_row_as_it_was():
    delta = make_delta()
    for change in delta.compose(delta.invert()).changes.values():
        assert torch.equal(change.before, change.after)


def test_composing_in_the_wrong_order_is_an_error():
    these = make_pools()
    first = learn(these, {"layer_1": [6, 1]}, seed=1)
    second = learn(these, {"layer_1": [1, 2]}, seed=2)
    with pytest.raises(PoolMismatchError, match="does not start from"):
        second.compose(first)


@pytest.mark.parametrize(("slots", "width"), [(SLOTS * 2, WIDTH + 1), (SLOTS, WIDTH + 1)])
def test_composing_deltas_of_other_pools_is_an_error(slots, width):
    other = RowChange(torch.tensor([12]), torch.zeros(1, width), torch.ones(1, width), slots)
    with pytest.raises(PoolMismatchError):
        make_delta().compose(SparseDelta({"layer_1": other}))


@pytest.mark.parametrize(
    ("slots", "width", "names"),
    [
        (SLOTS - 1, WIDTH, ["layer_1", "layer_2"]),
        (SLOTS, WIDTH + 1, ["layer_1", "layer_2"]),
        (SLOTS, WIDTH, ["layer_1"]),
    ],
    ids=["too small", "other width", "pool missing"],
)
def test_a_delta_of_another_pool_is_refused_and_nothing_is_written(slots, width, names):
    these = {name: pool for name, pool in make_pools(slots, width).items() if name in names}
    before = overlay_of(these)
    with pytest.raises(PoolMismatchError, match="apply it to the model it was made on"):
        make_delta().apply(these)
    assert overlay_of(these) == before
    assert torch.equal(these["layer_1"].current(torch.tensor([6])), torch.ones(1, width))


def test_a_delta_applies_to_a_pool_that_grew_and_composes_with_what_was_learned_there():
    these, delta = make_pools(), make_delta()
    these["layer_1"].grow(SLOTS * 4)
    delta.apply(these)
    added = RowChange(torch.tensor([SLOTS * 3]), torch.zeros(1, WIDTH), torch.ones(1, WIDTH), SLOTS * 4)
    both = delta.compose(SparseDelta({"layer_1": added}))
    assert both.changes["layer_1"].num_slots == SLOTS * 4
    SparseDelta({"layer_1": added}).apply(these)
    both.invert().apply(these)
    assert overlay_of(these) == overlay_of(make_pools())


@pytest.mark.parametrize("name", ["layer_1", "layer_2"])
def test_a_delta_that_starts_from_other_rows_is_refused_and_nothing_is_written(name):
    these = make_pools()
    changed = int(make_delta().changes[name].slot_ids[-1])
    row = these[name].current(torch.tensor([changed]))
    row[0, 0] = torch.nextafter(row[0, 0], torch.tensor(9.0))
    these[name].write(torch.tensor([changed]), row)
    before = rows_of(these)
    with pytest.raises(PoolMismatchError, match="in their order"):
        make_delta().apply(these)
    assert same_rows(rows_of(these), before)


def test_applying_twice_is_refused():
    these, delta = make_pools(), make_delta()
    delta.apply(these)
    with pytest.raises(PoolMismatchError):
        delta.apply(these)


def test_digest_changes_with_any_bit():
    delta = make_delta()
    digests = {delta.digest}
    changed = 0
    for part in ("slot_ids", "before", "after"):
        tensor = getattr(delta.changes["layer_1"], part)
        for index in range(tensor.numel()):
            for bit in (0, 7, 22, 31):
                flipped = tensor.clone()
                flipped.view(torch.int32).view(-1)[index] ^= torch.tensor(1 << bit).to(torch.int32)
                change = dataclasses.replace(delta.changes["layer_1"], **{part: flipped})
                digests.add(SparseDelta({**delta.changes, "layer_1": change}).digest)
                changed += 1
    assert len(digests) == changed + 1


def test_digest_depends_on_names_size_and_shape_but_not_on_order():
    delta = make_delta()
    one, two = delta.changes["layer_1"], delta.changes["layer_2"]
    others = [
        SparseDelta({"layer_1": one}),
        SparseDelta({"layer_1": two, "layer_2": one}),
        SparseDelta({"layer_3": one, "layer_2": two}),
        SparseDelta({"layer_1": dataclasses.replace(one, num_slots=SLOTS + 1), "layer_2": two}),
        SparseDelta({}),
    ]
    assert len({delta.digest, *(other.digest for other in others)}) == 6
    assert SparseDelta({"layer_2": two, "layer_1": one}).digest == delta.digest
