import pytest
import torch

from sparsemem.errors import ConfigError
from sparsemem.memory.pool import Pool
from sparsemem.training.optim import SlotOptimizer

NUM_SLOTS, WIDTH = 12, 5
OPTIONS = [
    ("adamw", {"weight_decay": 0.1}),
    ("adamw", {}),
    ("sgd", {"momentum": 0.9, "weight_decay": 0.1}),
    ("sgd", {"momentum": 0.9}),
    ("sgd", {}),
]
STOCK = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


@pytest.fixture
def start():
    return torch.randn(NUM_SLOTS, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def pool(start):
    pool = Pool(NUM_SLOTS, WIDTH)
    pool.write(torch.arange(NUM_SLOTS), start)
    return pool


def gradients(num_steps, seed=1):
    return torch.randn(num_steps, NUM_SLOTS, WIDTH, generator=torch.Generator().manual_seed(seed))


def train(pool, optimizer, selections, grads):
    for slot_ids, grad in zip(selections, grads, strict=True):
        pool.activate(slot_ids).grad = grad[slot_ids].clone()
        optimizer.step()
    pool.deactivate()


def stock(name, start, grads, **options):
    """Rows after a stock optimizer; `weight_decay=0` is not the default of AdamW."""
    rows = torch.nn.Parameter(start.clone())
    optimizer = STOCK[name]([rows], lr=0.05, **{"weight_decay": 0.0, **options})
    for grad in grads:
        rows.grad = grad.clone()
        optimizer.step()
    return rows.detach()


def test_adamw_scales_steps_along_the_axes_it_is_given(pool, start):
    """As the stock one does with rows that are written in those axes; weight decay knows no axes."""
    axes = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(2)))[0]
    slot_ids, grads, options = torch.tensor([7, 2, 9]), gradients(10), {"weight_decay": 0.1}
    optimizer = SlotOptimizer({"p": pool}, "adamw", lr=0.05, directions={"p": axes}, **options)
    train(pool, optimizer, [slot_ids] * 10, grads)
    turned = stock("adamw", start[slot_ids] @ axes, grads[:, slot_ids] @ axes, **options)
    torch.testing.assert_close(pool.current(slot_ids), turned @ axes.T, rtol=1e-5, atol=1e-6)
    plain = stock("adamw", start[slot_ids], grads[:, slot_ids], **options)
    assert not torch.allclose(pool.current(slot_ids), plain, atol=1e-2)


def test_sgd_is_the_same_in_all_axes(pool, start):
    axes = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(2)))[0]
    slot_ids, grads = torch.tensor([7, 2, 9]), gradients(10)
    train(pool, SlotOptimizer({"p": pool}, "sgd", lr=0.05, directions={"p": axes}), [slot_ids] * 10, grads)
    expected = stock("sgd", start[slot_ids], grads[:, slot_ids])
    torch.testing.assert_close(pool.current(slot_ids), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_a_constant_selection_is_trained_as_by_the_stock_optimizer(pool, start, name, options):
    slot_ids, grads = torch.tensor([7, 2, 9]), gradients(10)
    train(pool, SlotOptimizer({"p": pool}, name, lr=0.05, **options), [slot_ids] * 10, grads)
    expected = stock(name, start[slot_ids], grads[:, slot_ids], **options)
    torch.testing.assert_close(pool.current(slot_ids), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_state_follows_the_slot_when_selections_alternate(pool, start, name, options):
    selections = [torch.tensor(ids) for ids in ([3, 5], [8, 5, 0], [5, 3], [0], [0, 3, 8])]
    grads = gradients(5)
    train(pool, SlotOptimizer({"p": pool}, name, lr=0.05, **options), selections, grads)
    for slot in range(NUM_SLOTS):
        steps = [step for step, ids in enumerate(selections) if slot in ids]
        expected = stock(name, start[slot], grads[steps, slot], **options)
        torch.testing.assert_close(pool.current(torch.tensor([slot]))[0], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_rows_outside_the_selection_keep_every_bit(pool, start, name, options):
    trained = torch.tensor([1, 4])
    train(pool, SlotOptimizer({"p": pool}, name, lr=0.05, **options), [trained] * 10, gradients(10))
    others = torch.tensor([slot for slot in range(NUM_SLOTS) if slot not in trained])
    assert torch.equal(pool.current(others), start[others])
    assert not torch.isclose(pool.current(trained), start[trained]).any()


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_state_follows_the_tag_of_a_row_whatever_slots_hold_it(pool, start, name, options):
    selections = [([2, 9], [50, 50]), ([7, 4], [7, 60]), ([7, 2], [7, 50]), ([2], [50])]
    optimizer, grads = SlotOptimizer({"p": pool}, name, lr=0.05, **options), gradients(4)
    for (slot_ids, tags), grad in zip(selections, grads, strict=True):
        active = pool.activate(torch.tensor(slot_ids), torch.tensor(tags))
        active.grad = grad[: len(active)].clone()
        optimizer.step()
    pool.deactivate()
    expected = stock(name, start[2], torch.stack([grads[0][0], grads[2][1], grads[3][0]]), **options)
    torch.testing.assert_close(pool.current(torch.tensor([2]))[0], expected, rtol=1e-5, atol=1e-6)
    expected = stock(name, start[7], torch.stack([grads[1][0], grads[2][0]]), **options)
    torch.testing.assert_close(pool.current(torch.tensor([7]))[0], expected, rtol=1e-5, atol=1e-6)


def test_each_pool_has_its_own_state(pool, start):
    other = Pool(NUM_SLOTS, WIDTH)
    optimizer = SlotOptimizer({"a": pool, "b": other}, lr=0.05)
    slot_ids, grads = torch.tensor([2]), gradients(4)
    for step in range(4):
        pool.activate(slot_ids).grad = grads[step, slot_ids].clone()
        if step % 2:
            other.activate(slot_ids).grad = grads[step, slot_ids].clone()
        optimizer.step()
        optimizer.zero_grad()
    expected = stock("adamw", torch.zeros(1, WIDTH), grads[1::2, slot_ids])
    torch.testing.assert_close(other.current(slot_ids), expected)
    torch.testing.assert_close(pool.current(slot_ids), stock("adamw", start[slot_ids], grads[:, slot_ids]))


def test_rows_without_a_gradient_stay(pool, start):
    optimizer = SlotOptimizer({"p": pool}, lr=0.05, weight_decay=0.1)
    optimizer.step()
    pool.activate(torch.tensor([1])).grad = torch.ones(1, WIDTH)
    optimizer.zero_grad()
    optimizer.step()
    pool.deactivate()
    assert torch.equal(pool.current(torch.arange(NUM_SLOTS)), start)


def test_a_schedule_sets_the_step_size(pool, start):
    optimizer = SlotOptimizer({"p": pool}, "sgd", lr=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step == 0 else 0.0)
    slot_ids, grad = torch.tensor([1]), torch.ones(1, WIDTH)
    pool.activate(slot_ids).grad = grad
    for _ in range(3):
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(pool.current(slot_ids), start[slot_ids] - 0.5)


def test_an_unknown_optimizer_is_named(pool):
    with pytest.raises(ConfigError, match="optimizer='adam' is unknown; use one of adamw, sgd"):
        SlotOptimizer({"p": pool}, "adam", lr=0.1)


def rows_after_each_step(start, slot, grads):
    pool = Pool(NUM_SLOTS, WIDTH)
    pool.write(torch.arange(NUM_SLOTS), start)
    optimizer, found = SlotOptimizer({"p": pool}, "sgd", lr=0.1), []
    for grad in grads:
        train(pool, optimizer, [torch.tensor([slot])], grad.unsqueeze(0))
        found.append(pool.current(torch.tensor([slot]))[0])
    return torch.stack(found)


@pytest.mark.parametrize(
    ("average_from", "first"), [(0.0, 0), (0.5, 3), (0.6, 3), (0.7, 4), (0.99, 5), (1.0, 5)]
)
@pytest.mark.parametrize("extrapolate", [1.0, 1.5])
def test_a_row_of_a_fact_ends_as_the_mean_of_its_last_ones(pool, start, average_from, first, extrapolate):
    grads = gradients(6)
    ending = {"average_from": average_from, "extrapolate": extrapolate}
    optimizer = SlotOptimizer({"p": pool}, "sgd", lr=0.1, num_steps=6, **ending)
    slot_ids, tags = torch.tensor([2, 5]), torch.tensor([NUM_SLOTS + 1, 5])
    for number, grad in enumerate(grads):
        if number == 2:  # others, in between: a row counts its own steps
            train(pool, optimizer, [torch.tensor([7])], grads[:1])
        active = pool.activate(slot_ids, tags)  # rows ascend by tag
        active.grad = grad[[5, 2]].clone()
        optimizer.step()
    pool.deactivate()
    mean = rows_after_each_step(start, 2, grads)[first:].mean(dim=0)
    expected = start[2] + extrapolate * (mean - start[2])
    torch.testing.assert_close(pool.current(torch.tensor([2]))[0], expected)
    # A row that belongs to a slot, not to a fact, stays as the last step left it.
    torch.testing.assert_close(pool.current(torch.tensor([5]))[0], rows_after_each_step(start, 5, grads)[-1])
