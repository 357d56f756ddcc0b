import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemem.memory.read import sparse_read

ROW_IDS = {
    "all hit": [[0, 1, 2], [3, 4, 0]],
    "some miss": [[0, -1, 2], [-3, 4, -1]],
    "one token without hits": [[-1, -1, -2], [2, 0, 4]],
    "last token without hits": [[2, 0, 4], [-1, -1, -1]],
    "repeated rows": [[2, 2, 2], [2, -1, 2]],
    "no hits at all": [[-1, -2, -1], [-1, -1, -9]],
}


def dense_read(weights_TK, table_RV, row_ids_TK):
    hit = (row_ids_TK >= 0).unsqueeze(-1)
    rows_TKV = table_RV[row_ids_TK.clamp(min=0)] * hit
    return (weights_TK.unsqueeze(-1) * rows_TKV).sum(dim=1)


def inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    table = torch.randn(5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    return weights, table


@pytest.mark.parametrize("row_ids", ROW_IDS.values(), ids=ROW_IDS.keys())
def test_read_is_the_weighted_sum_of_the_rows_hit(row_ids):
    weights, table = inputs()
    row_ids = torch.tensor(row_ids)
    torch.testing.assert_close(sparse_read(weights, table, row_ids), dense_read(weights, table, row_ids))


@pytest.mark.parametrize("row_ids", ROW_IDS.values(), ids=ROW_IDS.keys())
def test_gradients_of_weights_and_table_pass_gradcheck(row_ids):
    row_ids = torch.tensor(row_ids)
    assert torch.autograd.gradcheck(lambda w, t: sparse_read(w, t, row_ids), inputs())


@settings(max_examples=30, deadline=None)
@given(data=st.data(), tokens=st.integers(0, 5), reads=st.integers(1, 4), rows=st.integers(1, 4))
def test_value_and_gradients_equal_the_dense_read(data, tokens, reads, rows):
    ids = st.lists(st.integers(-2, rows - 1), min_size=reads, max_size=reads)
    ids = data.draw(st.lists(ids, min_size=tokens, max_size=tokens))
    row_ids = torch.tensor(ids, dtype=torch.int64).view(tokens, reads)
    generator = torch.Generator().manual_seed(tokens)
    weights = torch.randn(tokens, reads, generator=generator, dtype=torch.float64, requires_grad=True)
    table = torch.randn(rows, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(tokens, 3, generator=generator, dtype=torch.float64)
    found, expected = sparse_read(weights, table, row_ids), dense_read(weights, table, row_ids)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, (weights, table), upstream),
        torch.autograd.grad(expected, (weights, table), upstream),
    )


def test_token_without_hits_is_exactly_zero():
    weights, table = inputs()
    row_ids = torch.tensor([[-1, -1, -1], [0, 1, 2]])
    values = sparse_read(weights, table, row_ids)
    assert torch.equal(values[0], torch.zeros(4, dtype=torch.float64))
    assert values[1].abs().sum() > 0


def test_an_empty_table_reads_as_zero():
    weights = torch.randn(2, 3, requires_grad=True)
    values = sparse_read(weights, torch.zeros(0, 4), torch.full((2, 3), -1))
    values.sum().backward()
    assert torch.equal(values, torch.zeros(2, 4))
    assert torch.equal(weights.grad, torch.zeros(2, 3))


def test_gradient_of_rows_that_are_not_read_is_exactly_zero():
    weights, table = inputs()
    sparse_read(weights, table, torch.tensor([[1, -1, 3], [3, 3, -1]])).square().sum().backward()
    assert torch.equal(table.grad[[0, 2, 4]], torch.zeros(3, 4, dtype=torch.float64))
    assert (table.grad[[1, 3]].abs().sum(dim=1) > 0).all()


def test_gradient_of_weights_that_miss_is_exactly_zero():
    weights, table = inputs()
    sparse_read(weights, table, torch.tensor([[1, -1, 3], [-1, 2, -1]])).square().sum().backward()
    missed = torch.tensor([[False, True, False], [True, False, True]])
    assert (weights.grad[missed] == 0).all()
    assert (weights.grad[~missed] != 0).all()
