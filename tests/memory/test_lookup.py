import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemem.memory.lookup import (
    SCORES_AT_ONCE,
    best_slots,
    product_key_top_k,
    slot_number,
    sub_key_scores,
)


def all_slot_scores(scores_TH2N):
    """By number of the slot."""
    first, second = scores_TH2N.unbind(dim=2)
    of_pairs = (first.unsqueeze(-1) + second.unsqueeze(-2)).flatten(-2)
    num_keys = first.shape[-1]
    return of_pairs[..., numbers(num_keys).flatten().argsort()]


def numbers(num_keys):
    """Number of each pair, shape (num_keys, num_keys)."""
    ids = torch.arange(num_keys)
    return slot_number(*torch.meshgrid(ids, ids, indexing="ij"))


@pytest.mark.parametrize("num_keys", [1, 2, 7, 32])
def test_slots_of_a_table_are_numbered_once_each_and_keep_their_number_in_a_larger_one(num_keys):
    assert numbers(num_keys).flatten().sort().values.tolist() == list(range(num_keys**2))
    assert torch.equal(numbers(num_keys + 5)[:num_keys, :num_keys], numbers(num_keys))


@pytest.mark.parametrize(
    ("tokens", "heads", "num_keys", "top_k"),
    [(5, 2, 8, 4), (1, 1, 2, 1), (3, 4, 16, 16), (4, 2, 5, 12), (2, 3, 4, 16), (7, 1, 1, 1), (0, 2, 8, 4)],
)
def test_top_k_equals_brute_force_over_all_slots(tokens, heads, num_keys, top_k):
    generator = torch.Generator().manual_seed(tokens + top_k)
    scores = torch.randn(tokens, heads, 2, num_keys, generator=generator, dtype=torch.float64)
    expected_scores, expected_ids = all_slot_scores(scores).topk(top_k, dim=-1)
    found_scores, found_ids = product_key_top_k(scores, top_k)
    assert torch.equal(found_scores, expected_scores)
    assert torch.equal(found_ids, expected_ids)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), num_keys=st.integers(1, 6))
def test_top_k_equals_brute_force_with_ties(data, num_keys):
    top_k = data.draw(st.integers(1, num_keys**2))
    values = data.draw(st.lists(st.integers(-3, 3), min_size=2 * num_keys, max_size=2 * num_keys))
    scores = torch.tensor(values, dtype=torch.float64).view(1, 1, 2, num_keys)
    expected_scores = all_slot_scores(scores).topk(top_k, dim=-1).values
    found_scores, found_ids = product_key_top_k(scores, top_k)
    assert torch.equal(found_scores, expected_scores)
    assert torch.equal(all_slot_scores(scores).gather(-1, found_ids), found_scores)
    assert found_ids.unique().numel() == top_k


@pytest.mark.parametrize("at_once", [1, 2 * 3 * 8 * 5, 10**6])
@pytest.mark.parametrize("tokens", [0, 1, 13])
def test_best_slots_are_the_same_however_many_tokens_are_scored_at_once(monkeypatch, at_once, tokens):
    monkeypatch.setitem(SCORES_AT_ONCE, "cpu", at_once)
    queries, keys, bias = torch.randn(tokens, 3, 2, 4), torch.randn(3, 2, 8, 4), torch.randn(3, 2, 8)
    scores, slot_ids = best_slots(queries, keys, bias, 6)
    expected_scores, expected_ids = product_key_top_k(sub_key_scores(queries, keys, bias), 6)
    torch.testing.assert_close(scores, expected_scores)
    assert torch.equal(slot_ids, expected_ids)


def test_gradients_of_best_slots_are_the_same_in_parts(monkeypatch):
    keys, bias = torch.randn(3, 2, 8, 4, requires_grad=True), torch.randn(3, 2, 8, requires_grad=True)
    queries, upstream = torch.randn(13, 3, 2, 4, requires_grad=True), torch.randn(13, 3, 6)
    gradients = []
    for at_once in (10**6, 1):
        monkeypatch.setitem(SCORES_AT_ONCE, "cpu", at_once)
        loss = (best_slots(queries, keys, bias, 6)[0] * upstream).sum()
        gradients.append(torch.autograd.grad(loss, (queries, keys, bias)))
    torch.testing.assert_close(*gradients)


def test_slots_come_best_first():
    scores, _ = product_key_top_k(torch.randn(6, 2, 2, 8), 20)
    assert (scores[..., :-1] >= scores[..., 1:]).all()


def test_slot_id_is_the_number_of_its_pair_of_sub_keys():
    scores = torch.zeros(1, 1, 2, 8)
    scores[0, 0, 0, 3], scores[0, 0, 1, 5] = 1.0, 1.0
    assert product_key_top_k(scores, 1)[1].item() == 5 * 5 + 3


def test_sub_key_scores_are_dot_products_plus_bias():
    queries, keys, bias = torch.randn(3, 2, 2, 4), torch.randn(2, 2, 5, 4), torch.randn(2, 2, 5)
    scores = sub_key_scores(queries, keys, bias)
    assert scores.shape == (3, 2, 2, 5)
    by_hand = queries[1, 0, 1] @ keys[0, 1, 4] + bias[0, 1, 4]
    torch.testing.assert_close(scores[1, 0, 1, 4], by_hand)


def test_bias_of_minus_half_the_squared_norm_ranks_by_distance():
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(5, 2, 2, 3, generator=generator, dtype=torch.float64)
    keys = 3 * torch.randn(2, 2, 6, 3, generator=generator, dtype=torch.float64)
    scores = sub_key_scores(queries, keys, -keys.square().sum(-1) / 2)
    _, found = product_key_top_k(scores, 36)
    distances = (queries.unsqueeze(3) - keys).square().sum(-1)
    assert torch.equal(found, all_slot_scores(distances).argsort(dim=-1))
