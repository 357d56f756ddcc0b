import math
from typing import get_args, get_type_hints

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemem.config import FinetuneConfig
from sparsemem.errors import PoolMismatchError
from sparsemem.slots.ranking import RANKINGS, kl, tf, tf_idf
from sparsemem.slots.usage import PoolUsage

every_ranking = pytest.mark.parametrize("ranking", RANKINGS.values(), ids=RANKINGS.keys())
FORMULAS = {name: ranking for name, ranking in RANKINGS.items() if name != "random"}

READS = torch.tensor([6, 0, 3, 1])
USAGE = PoolUsage.of_pool(
    reads=torch.tensor([40, 10, 0, 6]), document_frequency=torch.tensor([9, 4, 0, 2]), num_documents=9
)


def pool_usage(reads, frequency, num_documents):
    reads, frequency = torch.tensor(reads), torch.tensor(frequency)
    return PoolUsage.of_pool(reads, frequency, num_documents)


counts = st.integers(1, 12).flatmap(
    lambda size: st.tuples(
        st.lists(st.integers(0, 20), min_size=size, max_size=size),
        st.lists(st.integers(0, 500), min_size=size, max_size=size),
        st.lists(st.integers(0, 30), min_size=size, max_size=size),
    )
)


def test_tf_idf_by_hand():
    expected = [0.6 * math.log(10 / 10), 0.0, 0.3 * math.log(10 / 1), 0.1 * math.log(10 / 3)]
    torch.testing.assert_close(tf_idf(READS, USAGE), torch.tensor(expected))
    torch.testing.assert_close(tf_idf(READS, USAGE), torch.tensor([0.0, 0.0, 0.690776, 0.120397]))


def test_tf_by_hand():
    torch.testing.assert_close(tf(READS, USAGE), torch.tensor([0.6, 0.0, 0.3, 0.1]))


def test_kl_by_hand():
    background = [41 / 60, 11 / 60, 1 / 60, 7 / 60]
    expected = [
        0.6 * math.log(0.6 / background[0]),
        0.0,
        0.3 * math.log(0.3 / background[2]),
        0.1 * math.log(0.1 / background[3]),
    ]
    torch.testing.assert_close(kl(READS, USAGE), torch.tensor(expected))
    torch.testing.assert_close(kl(READS, USAGE), torch.tensor([-0.078032, 0.0, 0.867112, -0.015415]))


@settings(max_examples=40, deadline=None)
@given(counts=counts)
def test_scores_follow_the_formulas(counts):
    reads, background, frequency = counts
    usage = pool_usage(background, frequency, num_documents=30)
    total = max(sum(reads), 1)
    by_formula = {
        "tf": [r / total for r in reads],
        "tf_idf": [r / total * math.log(31 / (f + 1)) for r, f in zip(reads, frequency, strict=True)],
        "kl": [
            r / total * math.log(r / total / ((b + 1) / (sum(background) + len(reads)))) if r else 0.0
            for r, b in zip(reads, background, strict=True)
        ],
    }
    for name, ranking in FORMULAS.items():
        scores = ranking(torch.tensor(reads), usage)
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores, torch.tensor(by_formula[name]), rtol=1e-4, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(counts=counts)
def test_kl_scores_add_up_to_the_divergence(counts):
    reads, background, frequency = counts
    if not sum(reads):
        return
    shares = torch.tensor(reads, dtype=torch.float64) / sum(reads)
    smoothed = torch.tensor(background, dtype=torch.float64) + 1
    divergence = torch.special.entr(shares).neg() - shares * (smoothed / smoothed.sum()).log()
    score = kl(torch.tensor(reads), pool_usage(background, frequency, 30)).sum()
    torch.testing.assert_close(score, divergence.sum().float(), rtol=1e-4, atol=1e-5)
    assert score > -1e-5


@every_ranking
def test_slots_that_are_not_read_score_exactly_zero(ranking):
    assert ranking(READS, USAGE)[1] == 0.0
    assert torch.equal(ranking(torch.zeros(4, dtype=torch.int64), USAGE), torch.zeros(4))


@pytest.mark.parametrize("ranking", FORMULAS.values(), ids=FORMULAS.keys())
@settings(max_examples=20, deadline=None)
@given(counts=counts)
def test_the_slots_read_score_the_same_alone_as_within_the_pool(ranking, counts):
    reads, background, frequency = counts
    reads, usage = torch.tensor(reads), pool_usage(background, frequency, num_documents=30)
    read = reads.nonzero().flatten()
    assert torch.equal(ranking(reads[read], usage.take(read)), ranking(reads, usage)[read])


@every_ranking
@pytest.mark.parametrize("size", [3, 5, 0])
def test_usage_of_other_candidates_is_a_mismatch(ranking, size):
    with pytest.raises(PoolMismatchError, match=f"reads of {size} slots, but usage of 4"):
        ranking(torch.ones(size, dtype=torch.int64), USAGE)


def test_a_slot_that_every_document_reads_is_worth_nothing_to_tf_idf():
    assert tf_idf(READS, USAGE)[0] == 0.0
    assert tf(READS, USAGE).argmax() == 0
    assert kl(READS, USAGE)[0] < 0


def test_random_scores_are_the_same_in_every_call_and_ignore_how_often_a_slot_is_read():
    scores = RANKINGS["random"](READS, USAGE)
    assert torch.equal(scores, RANKINGS["random"](READS * 7, USAGE))
    assert len(scores[READS > 0].unique()) == 3


def test_rankings_are_the_choices_of_the_config():
    assert tuple(RANKINGS) == get_args(get_type_hints(FinetuneConfig)["ranking"])
    assert all(name == ranking.__name__ for name, ranking in RANKINGS.items())
