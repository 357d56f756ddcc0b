"""What cannot start is told, and what cannot go on leaves every row as it was."""

import dataclasses

import pytest
import torch

from sparsemem.config import FinetuneConfig
from sparsemem.data import Fact
from sparsemem.errors import ConfigError, DataError, PoolMismatchError, TrainingDivergedError
from sparsemem.memory.attach import find_blocks, memory_layers, pools
from sparsemem.training.finetune import finetune
from sparsemem.training.loss import FactLoss

from .conftest import equal


def fail_at(monkeypatch, step, make, part=0):
    """Let the `step`-th loss of training be `make(loss)`: of the facts (part 0) or of the drift (1)."""
    calls = []

    of_part = FactLoss.of_part

    def failing(*args):
        calls.append(1)
        losses = list(of_part(*args))
        if len(calls) == step:
            losses[part] = make(losses[part])
        return losses

    monkeypatch.setattr(FactLoss, "of_part", failing)


def interrupt(_nll):
    raise KeyboardInterrupt


@pytest.fixture
def taught(attached, tiny_tokenizer, usage, config):
    finetune(attached, tiny_tokenizer, [Fact(statement="Oob sings.")], usage, config)
    return attached


def test_all_weights_are_trained_in_float32_only(tiny_model, tiny_tokenizer):
    config = FinetuneConfig(method="full")
    with pytest.raises(ConfigError, match=r"needs weights in float32, and these are torch.bfloat16.*; load"):
        finetune(tiny_model.to(torch.bfloat16), tiny_tokenizer, [Fact(statement="Oob sings.")], None, config)


def check_untouched(model, rows, logits, all_rows, logits_of):
    assert equal(all_rows(model), rows)
    assert torch.equal(logits_of(model), logits)
    assert all(p.requires_grad for p in model.parameters())
    assert all(pool.active is None for pool in pools(model).values())
    assert all(layer.before_read is None for layer in memory_layers(model))
    assert not any("forward" in vars(block) for block in find_blocks(model))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("step", "part"), [(1, 0), (5, 0), (1, 1)])
def test_a_loss_that_is_not_finite_ends_it_and_puts_every_row_back(
    taught, tiny_tokenizer, facts, usage, config, all_rows, logits_of, monkeypatch, value, step, part
):
    rows, logits = all_rows(taught), logits_of(taught)
    fail_at(monkeypatch, step, lambda loss: loss + value, part)
    with pytest.raises(
        TrainingDivergedError, match=r"nothing was learned; lower the learning rate \(0\.05\)"
    ):
        finetune(taught, tiny_tokenizer, facts, usage, config)
    check_untouched(taught, rows, logits, all_rows, logits_of)


def test_a_huge_learning_rate_diverges(taught, tiny_tokenizer, facts, usage, config, all_rows, logits_of):
    rows, logits = all_rows(taught), logits_of(taught)
    with pytest.raises(TrainingDivergedError):
        finetune(taught, tiny_tokenizer, facts, usage, dataclasses.replace(config, learning_rate=1e38))
    check_untouched(taught, rows, logits, all_rows, logits_of)


@pytest.mark.parametrize("step", [1, 4])
def test_a_stop_within_a_step_puts_every_row_back(
    taught, tiny_tokenizer, facts, usage, config, all_rows, logits_of, monkeypatch, step
):
    rows, logits = all_rows(taught), logits_of(taught)
    fail_at(monkeypatch, step, interrupt)
    with pytest.raises(KeyboardInterrupt):
        finetune(taught, tiny_tokenizer, facts, usage, config)
    check_untouched(taught, rows, logits, all_rows, logits_of)


def test_a_stop_between_steps_puts_every_row_back(
    taught, tiny_tokenizer, facts, usage, config, all_rows, logits_of
):
    rows, logits = all_rows(taught), logits_of(taught)

    def stop(done, total, loss):
        assert total == 6
        assert loss > 0
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(taught, tiny_tokenizer, facts, usage, config, on_step=stop)
    check_untouched(taught, rows, logits, all_rows, logits_of)


def test_a_failing_evaluation_puts_every_row_back(
    taught, tiny_tokenizer, facts, usage, config, all_rows, logits_of
):
    rows, logits = all_rows(taught), logits_of(taught)

    def fail(_model):
        raise RuntimeError("of the caller")

    with pytest.raises(RuntimeError, match="of the caller"):
        finetune(taught, tiny_tokenizer, facts, usage, config, evaluate=fail)
    check_untouched(taught, rows, logits, all_rows, logits_of)


def test_usage_of_other_keys_is_refused(taught, tiny_tokenizer, facts, usage, config, all_rows):
    rows = all_rows(taught)
    with torch.no_grad():
        next(memory_layers(taught)).keys[0, 0, 0, 0] += 1
    with pytest.raises(PoolMismatchError, match="count_usage"):
        finetune(taught, tiny_tokenizer, facts, usage, config)
    assert equal(all_rows(taught), rows)


def test_usage_is_needed(attached, tiny_tokenizer, facts, config):
    with pytest.raises(PoolMismatchError, match="needs background usage"):
        finetune(attached, tiny_tokenizer, facts, None, config)


def test_facts_are_needed(attached, tiny_tokenizer, usage, config):
    with pytest.raises(DataError, match="no fact"):
        finetune(attached, tiny_tokenizer, [], usage, config)
