import contextlib
import copy
import dataclasses
import random

import pytest
import torch

from sparsemem.config import FinetuneConfig
from sparsemem.data import Fact
from sparsemem.likelihood import IGNORE, before_labels, label_log_probs, log_probs_at
from sparsemem.memory.attach import pools
from sparsemem.training import loss as loss_module
from sparsemem.training.examples import Example, collate
from sparsemem.training.finetune import build_examples, finetune
from sparsemem.training.loss import FactLoss


def plain(batch):
    return contextlib.nullcontext(batch)


def example(ids, labelled=(), subject=()):
    labels = tuple(token if place in labelled else IGNORE for place, token in enumerate(ids))
    return Example(0, tuple(ids), labels, tuple(place in subject for place in range(len(ids))))


EXAMPLES = [
    example([5, 6, 7, 8, 9], labelled=[3], subject=[1]),
    example([40, 41, 42], labelled=[1, 2]),
]


@pytest.fixture
def taught(attached):
    pool = pools(attached)["layer_1"]
    generator = torch.Generator().manual_seed(0)
    pool.write(torch.arange(pool.num_slots), torch.randn(pool.num_slots, pool.value_dim, generator=generator))
    return attached


def observed(model, locality=1.0, examples=EXAMPLES):
    loss = FactLoss(locality, random.Random(0))
    loss.observe(model, examples, plain)
    return loss


def test_what_is_compared_begins_at_the_subject_and_predicts_no_label(taught):
    part = collate(EXAMPLES)
    drawn = observed(taught).draw(part.examples)
    assert drawn == [[1, 3, 4], [2]]
    labelled = before_labels(part.labels)
    assert not any(labelled[row, positions].any() for row, positions in enumerate(drawn))


def test_no_more_positions_are_compared_than_the_limit_and_others_each_time(taught):
    long = collate([example(range(100, 150))])
    loss = observed(taught, examples=long.examples)
    draws = [loss.draw(long.examples)[0] for _ in range(100)]
    assert {len(drawn) for drawn in draws} == {loss_module.POSITIONS_PER_STEP}
    assert len({position for drawn in draws for position in drawn}) == loss_module.POSITIONS_KEPT


def test_without_locality_it_is_the_likelihood_of_the_labels_alone(taught):
    part = collate(EXAMPLES)
    loss = observed(taught, locality=0.0)
    nll, drift = loss.of_part(taught, part, loss.draw(part.examples))
    torch.testing.assert_close(nll, -label_log_probs(taught, *part.model_inputs).sum())
    assert drift == 0


def test_nothing_has_drifted_before_anything_is_learned(taught):
    part, loss = collate(EXAMPLES), observed(taught)
    nll, drift = loss.of_part(taught, part, loss.draw(part.examples))
    torch.testing.assert_close(nll, -label_log_probs(taught, *part.model_inputs).sum())
    assert abs(drift.item()) < 1e-5


def test_drift_is_the_divergence_where_all_tokens_are_remembered(taught, monkeypatch):
    monkeypatch.setattr(loss_module, "TOP_TOKENS", 10_000)
    part = collate(EXAMPLES)
    with without_rows(taught) as before:
        loss = observed(before, locality=3.0)
        positions = loss.draw(part.examples)
    _, drift = loss.of_part(taught, part, positions)
    with without_rows(taught) as before:
        expected = log_probs_of(before, part, positions)
    found = log_probs_of(taught, part, positions)
    exact = (expected.exp() * (expected - found)).sum()
    assert exact > 0.01
    torch.testing.assert_close(drift, 3 * exact, rtol=1e-3, atol=1e-4)


def test_drift_over_few_tokens_is_less_than_over_all(taught, monkeypatch):
    part, drifts = collate(EXAMPLES), []
    for top in (1, 8, 64, 10_000):
        monkeypatch.setattr(loss_module, "TOP_TOKENS", top)
        with without_rows(taught) as before:
            loss = observed(before)
        drifts.append(loss.of_part(taught, part, loss.draw(part.examples))[1].item())
    assert drifts == sorted(drifts)
    assert drifts[0] > 0


@contextlib.contextmanager
def without_rows(model):
    """The model as it was before its memory learned anything."""
    pool = pools(model)["layer_1"]
    slot_ids, rows = pool.written()
    pool.write(slot_ids, torch.zeros_like(rows))
    yield model
    pool.write(slot_ids, rows)


@torch.no_grad()
def log_probs_of(model, part, positions):
    mask = torch.zeros_like(part.attention_mask, dtype=torch.bool)
    for row, places in enumerate(positions):
        mask[row, places] = True
    return log_probs_at(model, part.input_ids, part.attention_mask, mask)


def test_a_certain_prediction_has_a_finite_gradient():
    log_probs = torch.tensor([[0.0, -200.0], [-1e-7, -20.0]], requires_grad=True)
    loss_module._with_rest(log_probs).sum().backward()
    assert log_probs.grad.isfinite().all()


def test_what_was_seen_is_not_observed_again_and_what_is_done_is_forgotten(taught):
    passes = []

    def counted(batch):
        passes.append(batch.examples)
        return contextlib.nullcontext(batch)

    loss = FactLoss(1.0, random.Random(0))
    loss.observe(taught, EXAMPLES[:1], counted)
    loss.observe(taught, EXAMPLES, counted)
    assert [examples for of_pass in passes for examples in of_pass] == EXAMPLES
    loss.observe(taught, EXAMPLES[1:], counted)
    assert list(loss._before) == EXAMPLES[1:]
    assert not taught.training


def test_locality_keeps_what_a_wording_predicts_beside_the_answer(attached, tiny_tokenizer, usage, config):
    """More of it, less drift, at the same number of steps."""
    facts = [Fact(statement="When Zed the potter was asked, it was Ana.", answer="Ana", subject="Zed")]
    examples = build_examples(facts, tiny_tokenizer, usage, config)[0]
    part, drifts = collate(examples), []
    for weight in (0.0, 1.0, 10.0):
        of_run = dataclasses.replace(config, penalty="local_kl", penalty_weight=weight, num_epochs=10)
        reference = observed(attached, examples=examples)
        delta = finetune(attached, tiny_tokenizer, facts, usage, of_run).delta
        drifts.append(reference.of_part(attached, part, reference.draw(part.examples))[1].item())
        delta.invert().apply(pools(attached))
    assert drifts[0] > drifts[1] > drifts[2]


def test_by_default_only_a_memory_is_held_in_place():
    assert FinetuneConfig().is_local
    assert not FinetuneConfig(method="lora").is_local
    assert not FinetuneConfig(penalty="none").is_local
    assert FinetuneConfig(method="full", penalty="local_kl").is_local
    assert not FinetuneConfig().is_guarded


@pytest.mark.parametrize("method", ["full", "lora"])
def test_other_methods_can_be_held_in_place_too(attached, tiny_tokenizer, config, method):
    facts = [Fact(statement="When Zed the potter was asked, it was Ana.", answer="Ana", subject="Zed")]
    examples = build_examples(facts, tiny_tokenizer, None, config)[0]
    part, drifts = collate(examples), []
    for penalty in ("none", "local_kl"):
        model = copy.deepcopy(attached)
        reference = observed(model, examples=examples)
        options = {"penalty": penalty, "learning_rate": 0.01, "num_epochs": 6, "mixed_precision": "bf16"}
        of_run = dataclasses.replace(config, method=method, **options)
        trained = finetune(model, tiny_tokenizer, facts, None, of_run).model
        assert not trained.training
        drifts.append(reference.of_part(trained, part, reference.draw(part.examples))[1].item())
    assert drifts[0] > drifts[1]


def test_in_a_stream_what_is_held_includes_what_was_just_learned(
    attached, tiny_tokenizer, facts, usage, config, monkeypatch
):
    seen = []
    observe = FactLoss.observe

    def spy(loss, model, examples, forward, own):
        pool = pools(model)["layer_1"]
        seen.append((len(pool.written()[0]), len(loss._before)))
        observe(loss, model, examples, forward, own)

    monkeypatch.setattr(FactLoss, "observe", spy)
    config = dataclasses.replace(config, stream=True, facts_per_batch=1)
    finetune(attached, tiny_tokenizer, facts, usage, config)
    written = [rows for rows, _ in seen]
    assert len(written) == len(facts)
    assert written[0] == 0
    assert written == sorted(set(written))
