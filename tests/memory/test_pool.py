import contextlib
import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemem.errors import ConfigError, PoolMismatchError
from sparsemem.memory.pool import Pool

SLOTS, WIDTH = 16, 4
EVERY = torch.arange(SLOTS)


def random_rows(slots, seed=0):
    return torch.randn(slots, WIDTH, generator=torch.Generator().manual_seed(seed))


def make_pool(with_base):
    return Pool(SLOTS, WIDTH, random_rows(SLOTS, seed=7) if with_base else None)


def bits(values):
    return values.detach().contiguous().view(torch.int32)


def same_bits(first, second):
    return torch.equal(bits(first), bits(second))


def some_reads(tokens=6, reads=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    slot_ids = torch.randint(0, SLOTS, (tokens, reads), generator=generator)
    return slot_ids, torch.randn(tokens, reads, generator=generator)


def dense_read(table, slot_ids, weights):
    return (weights.unsqueeze(-1) * table[slot_ids]).sum(dim=1)


with_and_without_base = pytest.mark.parametrize("with_base", [False, True], ids=["zeros", "base"])


def test_untrained_pool_reads_exactly_zero_and_knows_it():
    pool = Pool(SLOTS, WIDTH)
    slot_ids, weights = some_reads()
    assert pool.is_empty()
    assert torch.equal(pool.read(slot_ids, weights), torch.zeros(6, WIDTH))
    assert torch.equal(pool.current(EVERY), torch.zeros(SLOTS, WIDTH))


def test_base_of_given_values_is_read_and_takes_no_overlay_row():
    pool = make_pool(with_base=True)
    slot_ids, weights = some_reads()
    assert pool.num_rows == 0
    assert not pool.is_empty()
    assert same_bits(pool.current(EVERY), pool.base)
    torch.testing.assert_close(pool.read(slot_ids, weights), dense_read(pool.base, slot_ids, weights))


def test_base_of_another_shape_is_a_config_error():
    with pytest.raises(ConfigError, match=r"\(3, 4\).*\(16, 4\)"):
        Pool(SLOTS, WIDTH, torch.zeros(3, WIDTH))


@with_and_without_base
def test_overlay_lies_over_the_base(with_base):
    pool = make_pool(with_base)
    expected = pool.current(EVERY)
    written = torch.tensor([9, 2, 4])
    pool.write(written, random_rows(3))
    expected[written] = random_rows(3)
    slot_ids, weights = some_reads()
    assert same_bits(pool.current(EVERY), expected)
    torch.testing.assert_close(pool.read(slot_ids, weights), dense_read(expected, slot_ids, weights))
    assert pool.num_rows == 3


@with_and_without_base
def test_reads_cross_overlay_active_and_base_rows(with_base):
    pool = make_pool(with_base)
    pool.write(torch.tensor([1, 5, 11]), random_rows(3))
    active = pool.activate(torch.tensor([5, 8, 2]))
    with torch.no_grad():
        active.add_(1.0)
    slot_ids, weights = some_reads(tokens=12)
    expected = dense_read(pool.current(EVERY), slot_ids, weights)
    torch.testing.assert_close(pool.read(slot_ids, weights), expected)


@with_and_without_base
def test_activate_starts_from_the_current_rows(with_base):
    pool = make_pool(with_base)
    pool.write(torch.tensor([1, 5]), random_rows(2))
    before = pool.current(EVERY)
    chosen = torch.tensor([8, 5, 0])
    active = pool.activate(chosen)
    assert isinstance(active, torch.nn.Parameter)
    assert same_bits(active, before[chosen])
    assert same_bits(pool.current(EVERY), before)


@with_and_without_base
def test_active_gradient_is_that_of_a_dense_table(with_base):
    pool = make_pool(with_base)
    pool.write(torch.tensor([1, 5]), random_rows(2))
    table = pool.current(EVERY).requires_grad_()
    chosen = torch.tensor([8, 5, 0, 3])
    active = pool.activate(chosen)
    slot_ids, weights = some_reads(tokens=12)
    dense_weights, sparse_weights = weights.clone().requires_grad_(), weights.clone().requires_grad_()
    dense_read(table, slot_ids, dense_weights).square().sum().backward()
    pool.read(slot_ids, sparse_weights).square().sum().backward()
    torch.testing.assert_close(active.grad, table.grad[chosen])
    torch.testing.assert_close(sparse_weights.grad, dense_weights.grad)


def train(pool, active, optimizer, steps, seed=3):
    target = random_rows(12, seed=9)
    for step in range(steps):
        slot_ids, weights = some_reads(tokens=12, seed=seed + step)
        (pool.read(slot_ids, weights) - target).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@with_and_without_base
def test_adamw_leaves_every_other_slot_bit_identical(with_base):
    pool = make_pool(with_base)
    pool.write(torch.tensor([1, 5, 13]), random_rows(3))
    before = pool.current(EVERY)
    base_before = pool.base.clone() if with_base else None
    chosen = torch.tensor([8, 5, 0])
    active = pool.activate(chosen)
    train(pool, active, torch.optim.AdamW([active], lr=0.1, weight_decay=0.1), steps=10)
    outside = EVERY[~torch.isin(EVERY, chosen)]
    for _ in range(2):  # while they are active, and written back
        after = pool.current(EVERY)
        assert same_bits(after[outside], before[outside])
        assert (after[chosen] != before[chosen]).all()
        pool.deactivate()
    if with_base:
        assert same_bits(pool.base, base_before)


@with_and_without_base
def test_sgd_on_all_slots_equals_dense_training(with_base):
    pool = make_pool(with_base)
    table = torch.nn.Parameter(pool.current(EVERY))
    dense, sparse = torch.optim.SGD([table], lr=0.05), torch.optim.SGD([pool.activate(EVERY)], lr=0.05)
    target = random_rows(12, seed=9)
    for step in range(5):
        slot_ids, weights = some_reads(tokens=12, seed=step)
        (dense_read(table, slot_ids, weights) - target).square().sum().backward()
        (pool.read(slot_ids, weights) - target).square().sum().backward()
        for optimizer in (dense, sparse):
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(pool.current(EVERY), table.data)


@with_and_without_base
def test_deactivate_writes_the_active_rows(with_base):
    pool = make_pool(with_base)
    pool.write(torch.tensor([5]), random_rows(1))
    active = pool.activate(torch.tensor([8, 5]))
    with torch.no_grad():
        active.copy_(random_rows(2, seed=4))
    slot_ids, weights = some_reads()
    read_while_active = pool.read(slot_ids, weights).detach()
    pool.deactivate()
    assert pool.active is None
    assert same_bits(pool.current(torch.tensor([8, 5])), random_rows(2, seed=4))
    torch.testing.assert_close(pool.read(slot_ids, weights), read_while_active)
    assert pool.num_rows == 2


def test_deactivate_without_active_rows_changes_nothing():
    pool = make_pool(with_base=False)
    pool.write(torch.tensor([5]), random_rows(1))
    pool.deactivate()
    assert same_bits(pool.current(torch.tensor([5])), random_rows(1))


@with_and_without_base
def test_active_rows_that_did_not_move_leave_no_overlay(with_base):
    pool = make_pool(with_base)
    pool.activate(torch.tensor([8, 5]))
    pool.deactivate()
    assert pool.num_rows == 0


@with_and_without_base
def test_activating_again_keeps_what_the_first_selection_learned(with_base):
    pool = make_pool(with_base)
    expected = pool.current(EVERY)
    for chosen, seed in (([3, 8, 5], 1), ([5, 2, 8], 2), ([8, 5, 3], 3)):
        chosen = torch.tensor(chosen)
        active = pool.activate(chosen)
        assert same_bits(active, expected[chosen])
        with torch.no_grad():
            active.copy_(random_rows(3, seed))
        expected[chosen] = random_rows(3, seed)
        assert same_bits(pool.current(EVERY), expected)
    pool.deactivate()
    assert same_bits(pool.current(EVERY), expected)
    assert sorted(pool.written_ids.tolist()) == [2, 3, 5, 8]


@with_and_without_base
def test_writing_the_base_row_drops_the_overlay_row(with_base):
    pool = make_pool(with_base)
    base = pool.current(EVERY)
    pool.write(torch.tensor([3, 9, 1]), random_rows(3))
    pool.write(torch.tensor([9, 4]), base[[9, 4]])
    assert sorted(pool.written_ids.tolist()) == [1, 3]
    expected = base.clone()
    expected[[3, 9, 1]] = random_rows(3)
    expected[9] = base[9]
    assert same_bits(pool.current(EVERY), expected)
    pool.write(torch.tensor([1, 3]), base[[1, 3]])
    assert pool.num_rows == 0
    assert pool.is_empty() == (not with_base)


def test_negative_zero_is_not_the_zero_of_the_base():
    pool = Pool(SLOTS, WIDTH)
    pool.write(torch.tensor([3]), torch.full((1, WIDTH), -0.0))
    assert pool.num_rows == 1
    assert pool.current(torch.tensor([3])).signbit().all()
    pool.write(torch.tensor([3]), torch.zeros(1, WIDTH))
    assert pool.num_rows == 0
    assert not pool.current(torch.tensor([3])).signbit().any()


@settings(max_examples=40, deadline=None)
@given(
    with_base=st.booleans(),
    actions=st.lists(
        st.tuples(
            st.sampled_from(["write", "reset", "train"]), st.sets(st.integers(0, SLOTS - 1), max_size=6)
        ),
        max_size=6,
    ),
)
def test_pool_behaves_as_a_dense_table_and_stays_minimal(with_base, actions):
    pool = make_pool(with_base)
    base = pool.current(EVERY)
    expected = base.clone()
    for seed, (action, chosen) in enumerate(actions):
        chosen = torch.tensor(sorted(chosen, reverse=True), dtype=torch.int64)
        # Few rows, so that many slots hold the same, and one comes back after it was written over.
        rows = random_rows(3)[(chosen + seed) % 3] if action == "write" else random_rows(len(chosen), seed)
        expected[chosen] = base[chosen] if action == "reset" else rows
        if action == "train":
            active = pool.activate(chosen)
            with torch.no_grad():
                active.copy_(expected[chosen])
            pool.deactivate()
        else:
            pool.write(chosen, expected[chosen])
        assert same_bits(pool.current(EVERY), expected)
        differing = (bits(expected) != bits(base)).any(dim=1).nonzero().flatten()
        assert sorted(pool.written_ids.tolist()) == differing.tolist()
        distinct = {tuple(row) for row in bits(expected)[differing].tolist()}
        assert len(pool.rows) == pool.num_rows == len(distinct)
        assert pool.holders.sum() == len(differing)


def test_a_row_that_is_restored_is_the_one_that_other_slots_hold():
    pool, rows = Pool(SLOTS, WIDTH), random_rows(2)
    pool.write(torch.tensor([1, 2, 3]), rows[[0, 0, 0]])
    groups = pool.groups(EVERY)
    pool.write(torch.tensor([2]), rows[1:])
    assert pool.groups(torch.tensor([1, 2, 3])).tolist() == [0, SLOTS, 0]
    pool.write(torch.tensor([2]), rows[:1])
    assert torch.equal(pool.groups(EVERY), groups)
    assert pool.num_rows == 1


def test_rows_with_one_hash_are_told_apart(monkeypatch):
    monkeypatch.setattr("sparsemem.memory.rows._hashes", lambda rows: torch.zeros(len(rows)).long())
    pool, rows = Pool(SLOTS, WIDTH), random_rows(4)
    pool.write(torch.tensor([1, 2, 5]), rows[[0, 1, 0]])
    pool.write(torch.tensor([3, 4]), rows[2:])
    assert same_bits(pool.current(torch.tensor([1, 2, 5, 3, 4])), rows[[0, 1, 0, 2, 3]])


@pytest.mark.parametrize("slot_id", [SLOTS, 10**6, -1])
@pytest.mark.parametrize("action", ["write", "activate", "current"])
def test_slot_outside_the_pool_is_named_and_nothing_changes(action, slot_id):
    pool = Pool(SLOTS, WIDTH)
    pool.write(torch.tensor([2]), random_rows(1))
    slot_ids = torch.tensor([3, slot_id])
    with pytest.raises(PoolMismatchError, match=rf"slot {slot_id} .* {SLOTS} slots"):
        pool.write(slot_ids, random_rows(2)) if action == "write" else getattr(pool, action)(slot_ids)
    assert pool.active is None
    assert pool.written_ids.tolist() == [2]


@pytest.mark.parametrize("with_base", [False, True])
def test_rows_can_be_others_for_a_while_and_are_the_very_same_afterwards(with_base):
    pool = make_pool(with_base)
    pool.write(torch.tensor([2, 5, 7]), random_rows(3, seed=3))
    tensors = pool.rows, pool.holders, pool.slot_to_row
    before = [tensor.clone() for tensor in tensors]
    rows = torch.stack([pool._base_rows(EVERY)[5], random_rows(1)[0]])
    with contextlib.suppress(KeyError), pool.overwritten(torch.tensor([5, 9]), rows):
        assert pool.written_ids.tolist() == [2, 7, 9]
        assert same_bits(pool.current(torch.tensor([9])), random_rows(1))
        raise KeyError
    assert all(
        now is then for now, then in zip((pool.rows, pool.holders, pool.slot_to_row), tensors, strict=True)
    )
    assert all(torch.equal(now, then) for now, then in zip(tensors, before, strict=True))


def test_rows_that_are_appended_are_not_copied_each_time():
    pool, copies = Pool(4096, 8), set()
    expected = torch.randn(1000, 8)
    for start in range(0, 1000, 10):
        pool.write(torch.arange(start, start + 10), expected[start : start + 10])
        copies.add(pool.rows.data_ptr())
        assert pool.rows.shape == (start + 10, 8)
    assert len(copies) < 20
    assert torch.equal(pool.current(torch.arange(1000)), expected)
    assert torch.equal(pool.written_ids, torch.arange(1000))


def test_a_copy_of_a_pool_has_room_of_its_own():
    pool = Pool(64, 4)
    pool.write(torch.arange(10), torch.ones(10, 4))
    pool.write(torch.arange(10, 12), torch.ones(2, 4))
    other = copy.deepcopy(pool)
    other.write(torch.tensor([12]), torch.full((1, 4), 2.0))
    pool.write(torch.tensor([13]), torch.full((1, 4), 3.0))
    assert other.current(torch.tensor([12]))[0, 0] == 2
    assert pool.current(torch.tensor([13]))[0, 0] == 3
    moved = copy.deepcopy(pool).to(torch.bfloat16)
    moved.write(torch.tensor([14]), torch.full((1, 4), 4.0))
    restored = Pool(64, 4)
    restored.load_state_dict(moved.state_dict())
    assert torch.equal(restored.current(torch.arange(64)), moved.current(torch.arange(64)))
    assert torch.equal(pool.current(torch.arange(12)), torch.ones(12, 4))
