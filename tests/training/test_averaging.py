"""The row of a fact ends as the mean of its last ones."""

import copy
import dataclasses

import pytest
import torch

from sparsemem.data import Fact
from sparsemem.training.finetune import finetune


@pytest.fixture
def facts():
    # One alone: in this small a pool, two would choose the same slots, and give each a row of its own.
    return [Fact(question="Who owns Zed?", answer="Ana", subject="Zed")]


@pytest.mark.parametrize(("average_from", "first"), [(0.5, 3), (0.0, 0)])
def test_rows_of_facts_end_as_the_mean_of_those_of_the_last_epochs(
    attached, tiny_tokenizer, facts, usage, config, all_rows, average_from, first
):
    config = dataclasses.replace(config, num_epochs=6, average_from=1.0, extrapolate=1.0)
    epochs = []
    watched = copy.deepcopy(attached)
    collect = lambda model: epochs.append(all_rows(model)["layer_1"])
    last = finetune(watched, tiny_tokenizer, facts, usage, config, evaluate=collect).delta.changes["layer_1"]
    assert torch.equal(epochs[-1][last.slot_ids], last.after)
    config = dataclasses.replace(config, average_from=average_from)
    found = finetune(attached, tiny_tokenizer, facts, usage, config).delta.changes["layer_1"]
    assert torch.equal(found.slot_ids, last.slot_ids)
    assert not torch.allclose(found.after, last.after, atol=1e-3)
    torch.testing.assert_close(found.after, torch.stack(epochs[first:]).mean(dim=0)[last.slot_ids])


def test_rows_of_facts_end_beyond_the_mean(attached, tiny_tokenizer, facts, usage, config):
    rows = {}
    for extrapolate in (1.0, 1.5):
        of_run = dataclasses.replace(config, num_epochs=6, extrapolate=extrapolate)
        delta = finetune(copy.deepcopy(attached), tiny_tokenizer, facts, usage, of_run).delta
        rows[extrapolate] = delta.changes["layer_1"].after
    torch.testing.assert_close(rows[1.5], 1.5 * rows[1.0])  # they began as zeros


def test_rows_of_slots_stay_as_the_last_step_left_them(attached, tiny_tokenizer, facts, usage, config):
    found = []
    for average_from, extrapolate in ((1.0, 1.0), (0.5, 1.2)):
        options = {"average_from": average_from, "extrapolate": extrapolate, "tie_rows": False}
        of_run = dataclasses.replace(config, num_epochs=6, **options)
        delta = finetune(copy.deepcopy(attached), tiny_tokenizer, facts, usage, of_run).delta
        found.append(delta.changes["layer_1"].after)
    assert torch.equal(*found)
