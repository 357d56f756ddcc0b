import pytest
import torch
from torch.nn.functional import silu

from sparsemem.memory.layer import MemoryLayer, init_memory
from sparsemem.memory.pool import Pool

WIDTH, KEYS, HEADS, TOP_K, QUERY = 12, 4, 2, 3, 5
SLOTS = KEYS**2


def make_layer(placement="add", value_dim=WIDTH, seed=0, **options):
    layer = MemoryLayer(
        WIDTH,
        Pool(SLOTS, value_dim),
        num_keys=KEYS,
        num_heads=HEADS,
        top_k=TOP_K,
        query_dim=QUERY,
        placement=placement,
        **options,
    )
    generator = torch.Generator().manual_seed(seed)
    init_memory(layer, generator)
    layer.pool.write(torch.arange(SLOTS), torch.randn(SLOTS, value_dim, generator=generator))
    return layer


def some_hidden(*shape, seed=1):
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(seed))


def dense_pool(table):
    """A `Pool.read` of one trainable table, by plain autograd."""
    return lambda slot_ids, weights: (weights.unsqueeze(-1) * table[slot_ids]).sum(dim=1)


@pytest.mark.parametrize("placement", ["add", "replace"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 3), (4,), (1, 1)])
def test_output_has_shape_and_dtype_of_the_hidden_state(placement, dtype, shape):
    hidden = some_hidden(*shape).to(dtype)
    output = make_layer(placement)(hidden)
    assert output.shape == hidden.shape
    assert output.dtype == dtype


def test_output_is_the_weighted_sum_of_the_rows_of_all_heads():
    layer = make_layer()
    hidden = some_hidden(2, 3)
    slot_ids, weights = layer.lookup(hidden)
    rows = layer.pool.current(slot_ids.flatten()).view(*slot_ids.shape, WIDTH)
    expected = (weights.unsqueeze(-1) * rows).sum(dim=(2, 3))
    torch.testing.assert_close(layer(hidden), expected)


def sparse_layer(quorum):
    """A layer whose first slots hold: one row twice, another twice, two rows of their own, nothing."""
    layer = make_layer(quorum=quorum)
    layer.pool = Pool(SLOTS, WIDTH)
    layer.pool.write(torch.arange(6), torch.randn(4, WIDTH), torch.tensor([0, 0, 1, 1, 2, 3]))
    return layer


@pytest.mark.parametrize("is_trained", [False, True])
@pytest.mark.parametrize(
    ("shares", "agreement"),
    [
        ([0.0, 0.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]),
        ([0.2, 0.2, 0.0, 0.0, 0.0, 0.0], [0.6, 0.6, 0.0, 0.0, 0.0, 0.0]),
        ([0.1, 0.1, 0.2, 0.3, 0.2, 0.1], [0.0, 0.0, 1.0, 1.0, 0.2, 0.2]),
        ([0.6, 0.0, 0.1, 0.1, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]),
    ],
)
def test_reads_count_with_those_that_find_the_same_row(shares, agreement, is_trained):
    layer = sparse_layer(quorum=0.5)
    if is_trained:
        layer.pool.activate(torch.tensor([1, 0, 4]), torch.tensor([9, 9, 4]))
    slot_ids = torch.arange(HEADS * TOP_K).unsqueeze(0)
    weights = torch.tensor([shares]) * HEADS
    found = layer.agreement(slot_ids, weights)
    torch.testing.assert_close(found, torch.tensor([agreement]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tokens_at_a_time", [1, 256])
def test_each_read_is_scaled_by_what_agrees_with_it(tokens_at_a_time, monkeypatch):
    monkeypatch.setattr("sparsemem.memory.layer.TOKENS_AT_A_TIME", tokens_at_a_time)
    layer, plain = sparse_layer(quorum=0.4), sparse_layer(quorum=0.0)
    for some in (layer, plain):
        some.pool.write(torch.arange(SLOTS), torch.randn(3, WIDTH), torch.arange(SLOTS) % 3)
    hidden = some_hidden(2, 3)
    slot_ids, weights = layer.lookup(hidden)
    agreement = layer.agreement(slot_ids.flatten(0, 1).flatten(1), weights.flatten(0, 1).flatten(1))
    scaled = weights * agreement.view_as(weights)
    assert 0 < scaled.sum() < weights.sum()
    rows = layer.pool.current(slot_ids.flatten()).view(*slot_ids.shape, WIDTH)
    torch.testing.assert_close(layer(hidden), (scaled.unsqueeze(-1) * rows).sum(dim=(2, 3)))


def test_what_too_few_reads_find_is_exactly_nothing():
    layer = sparse_layer(quorum=1.0)
    hidden = some_hidden(200, 1)[:, 0]
    slot_ids, weights = (tensor.flatten(1) for tensor in layer.lookup(hidden))
    is_answered = layer.agreement(slot_ids, weights).any(dim=1)
    finds = torch.isin(slot_ids, layer.pool.written_ids).any(dim=1)
    assert (finds & ~is_answered).any()
    assert torch.equal(layer(hidden).any(dim=1), is_answered)


def test_weights_are_a_softmax_over_the_slots_read_in_float32():
    slot_ids, weights = make_layer().lookup(some_hidden(2, 3).bfloat16())
    assert slot_ids.shape == weights.shape == (2, 3, HEADS, TOP_K)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 3, HEADS))
    assert (weights[..., :-1] >= weights[..., 1:]).all()


def test_reads_do_not_change_under_autocast():
    layer, hidden = make_layer(), some_hidden(2, 3)
    expected = layer(hidden)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(hidden), expected)


def test_casting_the_layer_changes_no_read():
    layer, hidden = make_layer(), some_hidden(2, 3)
    expected = layer(hidden)
    assert torch.equal(layer.to(torch.bfloat16)(hidden), expected)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_output_is_in_units_of_value_scale(factor):
    layer, hidden = make_layer(), some_hidden(2, 3)
    expected = factor * layer(hidden)
    layer.value_scale.fill_(factor)
    torch.testing.assert_close(layer(hidden), expected)


def test_before_read_sees_the_reads_before_a_row_is_touched():
    layer, hidden = make_layer(), some_hidden(2, 3)
    calls = []

    def hook(caller, reads):
        hidden, slot_ids, weights = reads
        calls.append((caller, hidden.shape, slot_ids.shape, slot_ids.dtype))
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, HEADS))
        # What is activated here is what this very pass reads.
        with torch.no_grad():
            caller.pool.activate(slot_ids.unique()).zero_()

    layer.before_read = hook
    output = layer(hidden)
    assert calls == [(layer, (2, 3, WIDTH), (2, 3, HEADS, TOP_K), torch.int64)]
    assert torch.equal(output, torch.zeros(2, 3, WIDTH))
    output.sum().backward()
    assert layer.pool.active.grad is not None


def test_gradients_reach_hidden_keys_and_query():
    layer = make_layer()
    hidden = some_hidden(2, 3).requires_grad_()
    layer(hidden).square().sum().backward()
    for tensor in (hidden, layer.keys, layer.key_bias, layer.query.weight, layer.query.bias):
        assert tensor.grad is not None
        assert tensor.grad.abs().sum() > 0


def test_gradients_equal_those_of_a_dense_table():
    layer, twin = make_layer(), make_layer()
    twin.pool.read = dense_pool(twin.pool.current(torch.arange(SLOTS)))
    names = ("keys", "key_bias", "query.weight", "query.bias")
    found_hidden, expected_hidden = (some_hidden(2, 3).requires_grad_() for _ in range(2))
    layer(found_hidden).square().sum().backward()
    twin(expected_hidden).square().sum().backward()
    torch.testing.assert_close(found_hidden.grad, expected_hidden.grad)
    for name in names:
        torch.testing.assert_close(layer.get_parameter(name).grad, twin.get_parameter(name).grad)


def test_lower_of_two_stacked_memories_gets_the_gradient_of_dense_tables():
    hidden = some_hidden(2, 3)
    chosen = torch.tensor([1, 4, 7, 8, 15])
    lower, upper = make_layer(seed=0), make_layer(seed=5)
    lower_active, upper_active = lower.pool.activate(chosen), upper.pool.activate(chosen)

    def loss():
        states = hidden + lower(hidden)
        return (states + upper(states)).square().sum()

    found = torch.autograd.grad(loss(), (lower_active, upper_active))
    tables = []
    for layer in (lower, upper):
        tables.append(layer.pool.current(torch.arange(SLOTS)).requires_grad_())
        layer.pool.read = dense_pool(tables[-1])
    expected = torch.autograd.grad(loss(), tables)
    for gradient, dense in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, dense[chosen], rtol=1e-4, atol=1e-4)
        assert gradient.abs().sum() > 0


def test_lower_of_two_layers_that_share_a_pool_adds_its_gradient():
    hidden = some_hidden(2, 3)
    lower, upper = make_layer(seed=0), make_layer(seed=5)
    upper.pool = lower.pool
    active = lower.pool.activate(torch.arange(SLOTS))

    def loss():
        states = hidden + lower(hidden)
        return (states + upper(states)).square().sum()

    (found,) = torch.autograd.grad(loss(), active)
    table = lower.pool.current(torch.arange(SLOTS)).requires_grad_()
    lower.pool.read = dense_pool(table)
    (expected,) = torch.autograd.grad(loss(), table)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_replace_is_the_gated_formula_of_memory_plus():
    layer = make_layer("replace", value_dim=7)
    hidden = some_hidden(2, 3)
    slot_ids, weights = layer.lookup(hidden)
    rows = layer.pool.current(slot_ids.flatten()).view(*slot_ids.shape, 7)
    y = (weights.unsqueeze(-1) * rows).sum(dim=(2, 3))
    expected = (y * silu(hidden @ layer.gate.weight.T)) @ layer.out.weight.T
    torch.testing.assert_close(layer(hidden), expected)


def test_gradients_reach_the_gate_and_its_output():
    layer = make_layer("replace", value_dim=7)
    layer(some_hidden(2, 3)).square().sum().backward()
    for name in ("gate.weight", "out.weight", "keys", "query.weight"):
        assert layer.get_parameter(name).grad.abs().sum() > 0


def test_init_is_the_same_for_the_same_seed():
    first, second, other = make_layer(seed=3), make_layer(seed=3), make_layer(seed=4)
    assert torch.equal(first.keys, second.keys)
    assert torch.equal(first.query.weight, second.query.weight)
    assert not torch.equal(first.keys, other.keys)


def test_a_layer_is_silent_only_while_nothing_can_come_out_of_it():
    layer = MemoryLayer(
        WIDTH, Pool(SLOTS, WIDTH), num_keys=KEYS, num_heads=HEADS, top_k=TOP_K, query_dim=QUERY
    )
    assert layer.is_silent()
    layer.before_read = lambda *_: None
    assert not layer.is_silent()
    layer.before_read = None
    layer.pool.activate(torch.tensor([2]))
    assert not layer.is_silent()
    layer.pool.deactivate()
    assert layer.is_silent()
    layer.pool.write(torch.tensor([2]), torch.ones(1, WIDTH))
    assert not layer.is_silent()
    assert not make_layer("replace").is_silent()
