"""How often, in what order and how precisely facts are shown; and what stands beside them."""

import copy
import dataclasses

import pytest
import torch

import sparsemem.training.step as step_module
from sparsemem.config import FinetuneConfig, MemoryConfig
from sparsemem.data import Fact
from sparsemem.errors import ConfigError
from sparsemem.memory.attach import attach_memory, pools
from sparsemem.slots.usage import count_usage
from sparsemem.training.finetune import build_examples, finetune
from sparsemem.training.methods import SparseMemory

from .conftest import USAGE_OPTIONS


@pytest.fixture
def facts():
    statements = [f"Zed is the {word} of Ana." for word in ("cat", "dog", "hen", "cow")]
    return [
        Fact(question="Who owns Zed?", answer="Ana", paraphrases=statements, subject="Zed", id="0"),
        Fact(question="Where is Xix?", answer="Oslo", paraphrases=statements, subject="Xix", id="1"),
        Fact(question="What is Quz?", answer="tin", paraphrases=statements, subject="Quz", id="2"),
    ]


@pytest.fixture
def shown(monkeypatch):
    """What each step computed, as (facts of the batch, examples)."""
    steps = []
    add_gradients = step_module.GradientStep.add_gradients
    collate_parts = step_module.collate_parts

    def spy_step(step, batch):
        steps.append(([wordings[0].fact_index for wordings in batch], []))
        return add_gradients(step, batch)

    def spy_parts(examples, *rest):
        steps[-1][1].extend(examples)
        return collate_parts(examples, *rest)

    monkeypatch.setattr(step_module.GradientStep, "add_gradients", spy_step)
    monkeypatch.setattr(step_module, "collate_parts", spy_parts)
    return steps


def test_each_step_draws_some_wordings_of_each_fact(attached, tiny_tokenizer, facts, usage, config, shown):
    finetune(attached, tiny_tokenizer, facts, usage, dataclasses.replace(config, wordings_per_step=2))
    for of_batch, examples in shown:
        assert sorted(e.fact_index for e in examples if e.teaches) == sorted(of_batch * 2)
        assert len(set(examples)) == len(examples)
    distinct = {e for _, examples in shown for e in examples if e.fact_index == 0 and e.teaches}
    assert len(distinct) > 2


@pytest.mark.parametrize("method", ["memory", "full"])
def test_what_is_only_listened_to_is_never_trained(
    attached, tiny_tokenizer, facts, usage, config, shown, method
):
    config = dataclasses.replace(config, max_length=512)
    finetune(attached, tiny_tokenizer, facts, usage, dataclasses.replace(config, method=method))
    listened = [e for of_fact in build_examples(facts, tiny_tokenizer, usage, config) for e in of_fact]
    listened = {e for e in listened if not e.is_trained}
    assert len(listened) == len(facts)
    assert not listened & {e for _, examples in shown for e in examples}


@pytest.mark.parametrize(
    "fact",
    [
        Fact(question="Who owns it?", answer="Ana", subject="Zed", paraphrases=("Zed is Ana's.",)),
        Fact(question="What is the currency there?", answer="franc", subject="France"),
        Fact(question="Who owns Zed?", answer="Ana", subject="Zed", subject_aliases=("France", "Jupiter")),
    ],
    ids=["not named in the question", "named in examples only", "alias in examples"],
)
def test_what_stands_in_examples_before_a_question_is_not_its_subject(
    attached, tiny_tokenizer, usage, config, fact
):
    config = dataclasses.replace(config, max_length=512, num_epochs=6, held_per_step=99)
    (examples,) = build_examples([fact], tiny_tokenizer, usage, config)
    for example in examples:
        if not example.is_trained:
            assert example.teaches
            assert tiny_tokenizer.decode(example.input_ids[example.start :]).count("Question") <= 1
    assert any(example.is_trained and example.teaches for example in examples)
    finetune(attached, tiny_tokenizer, [fact], usage, config)


@pytest.mark.parametrize(
    ("options", "num"),
    [({}, 1), ({"held_per_step": 2}, 2), ({"held_per_step": 0}, 0), ({"penalty": "none"}, 0)],
    ids=str,
)
def test_each_step_holds_some_other_texts_of_each_fact(
    attached, tiny_tokenizer, facts, usage, config, shown, options, num
):
    finetune(attached, tiny_tokenizer, facts, usage, dataclasses.replace(config, **options))
    for of_batch, examples in shown:
        assert sorted(e.fact_index for e in examples if not e.teaches) == sorted(of_batch * num)


def test_all_methods_see_the_same_facts_in_the_same_order(
    attached, tiny_tokenizer, facts, usage, config, shown
):
    orders = []
    for options in ({}, {"penalty": "none"}, {"method": "full"}):
        shown.clear()
        of_run = dataclasses.replace(config, wordings_per_step=1, num_epochs=6, **options)
        finetune(copy.deepcopy(attached), tiny_tokenizer, facts, usage, of_run)
        orders.append([of_batch for of_batch, _ in shown])
    assert orders[0] == orders[1] == orders[2]
    assert len({str(order) for order in orders[0]}) > 2


def test_slots_are_chosen_for_all_wordings_and_not_for_those_drawn(
    attached, tiny_tokenizer, facts, usage, config
):
    config = dataclasses.replace(config, num_epochs=1)
    whole = finetune(attached, tiny_tokenizer, facts, usage, config).delta
    whole.invert().apply(pools(attached))
    drawn = finetune(
        attached, tiny_tokenizer, facts, usage, dataclasses.replace(config, wordings_per_step=1)
    ).delta
    assert torch.equal(drawn.changes["layer_1"].slot_ids, whole.changes["layer_1"].slot_ids)


def test_a_stream_shows_each_fact_all_its_epochs_before_the_next(
    attached, tiny_tokenizer, facts, usage, config, shown
):
    config = dataclasses.replace(config, stream=True, facts_per_batch=1)
    result = finetune(attached, tiny_tokenizer, facts, usage, config, evaluate=lambda _: len(shown))
    assert [of_batch for of_batch, _ in shown] == [[0]] * 3 + [[1]] * 3 + [[2]] * 3
    assert result.evaluations == ((1, 3), (2, 6), (3, 9))


def test_bf16_computes_nearly_the_same_and_keeps_rows_in_float32(
    attached, tiny_tokenizer, facts, usage, config, all_rows
):
    exact = finetune(attached, tiny_tokenizer, facts, usage, config)
    exact.delta.invert().apply(pools(attached))
    fast = finetune(
        attached, tiny_tokenizer, facts, usage, dataclasses.replace(config, mixed_precision="bf16")
    )
    assert fast.losses != exact.losses
    assert fast.losses == pytest.approx(exact.losses, rel=0.05)
    assert all(rows.dtype == torch.float32 for rows in all_rows(attached).values())
    assert all(p.dtype == torch.float32 for p in attached.parameters())


@pytest.mark.parametrize("method", ["memory", "full"])
@pytest.mark.parametrize(
    "options", [{"penalty": "kl", "penalty_weight": 20.0}, {"replay_fraction": 0.5}], ids=str
)
def test_a_guard_changes_what_is_learned(attached, tiny_tokenizer, facts, usage, texts, method, options):
    config = FinetuneConfig(method=method, learning_rate=0.01, num_epochs=4, top_t=8, penalty="none")
    guarded = dataclasses.replace(config, **options)
    losses = []
    for of_run in (config, guarded):
        torch.manual_seed(0)
        start = {name: value.clone() for name, value in attached.state_dict().items()}
        result = finetune(attached, tiny_tokenizer, facts, usage, of_run, background=texts)
        losses.append(result.losses)
        if result.delta:
            result.delta.invert().apply(pools(attached))
        else:
            attached.load_state_dict(start)
    assert losses[0][0] == losses[1][0]
    assert losses[0][1:] != losses[1][1:]


def test_a_guard_without_background_is_told_before_anything_is_changed(
    attached, tiny_tokenizer, facts, usage, config
):
    before = {name: value.clone() for name, value in attached.state_dict().items()}
    trainable = [p.requires_grad for p in attached.parameters()]
    with pytest.raises(ConfigError, match="background"):
        finetune(attached, tiny_tokenizer, facts, usage, dataclasses.replace(config, penalty="kl"))
    assert all(torch.equal(before[name], value) for name, value in attached.state_dict().items())
    assert [p.requires_grad for p in attached.parameters()] == trainable


@pytest.mark.parametrize(
    "options",
    [
        {"wordings_per_step": 0},
        {"replay_fraction": 1.0},
        {"penalty_weight": -1.0},
        {"held_per_step": -1},
        {"adam_beta1": 1.0},
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        FinetuneConfig(**options)


def rows_and_slots(delta):
    """How many distinct rows an update left, and in how many slots."""
    (change,) = delta.changes.values()
    return len(change.after.unique(dim=0)), len(change.slot_ids)


@pytest.fixture
def large(tiny_model, tiny_tokenizer, texts):
    """A memory in which facts choose different slots, and its background usage."""
    model = attach_memory(
        tiny_model,
        MemoryConfig(layers=(1,), num_keys=64, num_heads=2, top_k=4, query_dim=4, quorum=0.1, relation_dim=0),
    )
    return model, count_usage(model, tiny_tokenizer, texts, **USAGE_OPTIONS)


def test_the_slots_of_a_fact_hold_one_row(large, tiny_tokenizer, facts, config):
    model, usage = large
    for facts_per_batch in (1, 2):
        of_run = dataclasses.replace(config, facts_per_batch=facts_per_batch)
        delta = finetune(copy.deepcopy(model), tiny_tokenizer, facts, usage, of_run).delta
        num_rows, num_slots = rows_and_slots(delta)
        assert num_rows == len(facts) < num_slots


@pytest.mark.parametrize("options", [{"tie_rows": False}, {"anchor": "all"}], ids=str)
def test_each_slot_has_its_own_row_where_rows_are_not_tied(
    attached, tiny_tokenizer, facts, usage, config, options
):
    delta = finetune(attached, tiny_tokenizer, facts, usage, dataclasses.replace(config, **options)).delta
    num_rows, num_slots = rows_and_slots(delta)
    assert num_rows == num_slots > len(facts)


def test_a_fact_without_a_subject_has_many_rows(attached, tiny_tokenizer, usage, config):
    facts = [Fact(statement="It was cold.", subject="nowhere")]
    num_rows, num_slots = rows_and_slots(finetune(attached, tiny_tokenizer, facts, usage, config).delta)
    assert num_rows == num_slots > 1


@pytest.mark.parametrize("facts_per_batch", [1, 2])
def test_facts_of_one_subject_share_its_slots_with_a_row_each(large, tiny_tokenizer, config, facts_per_batch):
    model, usage = large
    facts = [
        Fact(statement="Zed Quz Xix lives with Ana.", answer="Ana", subject="Zed Quz Xix", id="0"),
        Fact(statement="Zed Quz Xix lives in Oslo.", answer="Oslo", subject="Zed Quz Xix", id="1"),
    ]
    of_run = dataclasses.replace(config, facts_per_batch=facts_per_batch, held_per_step=0)
    num_rows, num_slots = rows_and_slots(finetune(model, tiny_tokenizer, facts, usage, of_run).delta)
    assert num_rows > num_slots / 2 > len(facts)


def test_no_other_fact_pulls_at_the_slots_of_a_fact(large, tiny_tokenizer, facts, config):
    model, usage = large
    # Which of the texts is held is drawn, and drawn differently where there are more facts.
    stream = dataclasses.replace(config, stream=True, held_per_step=0)

    def rows_after(some):
        delta = finetune(copy.deepcopy(model), tiny_tokenizer, some, usage, stream).delta
        (change,) = delta.changes.values()
        return dict(zip(change.slot_ids.tolist(), change.after, strict=True))

    first, both = rows_after(facts[:2]), rows_after(facts)
    assert len(first) < len(both)
    assert all((row - both[slot_id]).abs().max() < 1e-6 for slot_id, row in first.items())


def test_a_later_update_leaves_the_slots_of_earlier_ones_alone(large, tiny_tokenizer, facts, config):
    model, usage = large
    (first,) = finetune(model, tiny_tokenizer, facts[:2], usage, config).delta.changes.values()
    alone = finetune(copy.deepcopy(model), tiny_tokenizer, facts[2:], usage, config).delta
    (second,) = alone.changes.values()
    assert not set(first.slot_ids.tolist()) & set(second.slot_ids.tolist())
    untied = dataclasses.replace(config, tie_rows=False)
    (paper,) = finetune(model, tiny_tokenizer, facts[2:], usage, untied).delta.changes.values()
    assert set(first.slot_ids.tolist()) & set(paper.slot_ids.tolist()), "else the test shows nothing"


def test_a_later_fact_about_the_same_subject_shares_its_slots(large, tiny_tokenizer, config):
    model, usage = large
    one, other = (
        Fact(statement=f"Zed Quz Xix lives {where}.", answer=answer, subject="Zed Quz Xix", id=answer)
        for where, answer in (("with Ana", "Ana"), ("in Oslo", "Oslo"))
    )
    of_run = dataclasses.replace(config, held_per_step=0)
    (first,) = finetune(model, tiny_tokenizer, [one], usage, of_run).delta.changes.values()
    (second,) = finetune(model, tiny_tokenizer, [other], usage, of_run).delta.changes.values()
    shared = set(first.slot_ids.tolist()) & set(second.slot_ids.tolist())
    assert len(shared) > len(first.slot_ids) / 2
    assert len(second.after.unique(dim=0)) > 1


def test_only_what_mostly_one_other_fact_owns_is_shared(large, tiny_tokenizer, config):
    model, usage = large
    pools(model)["layer_1"].write(torch.arange(40, 48), torch.randn(2, 32), torch.arange(8) // 4)
    method = SparseMemory(model, tiny_tokenizer, usage, config)

    def trained(fact, slot_ids):
        return method._claim("layer_1", {fact: torch.tensor(slot_ids)}, {fact})[0].tolist()

    assert trained(0, [0, 1, 2, 3]) == [0, 1, 2, 3]
    assert trained(1, [3, 4, 5, 6]) == [4, 5, 6]
    assert trained(2, [0, 1, 4, 5, 20]) == [20], "two others own two each"
    assert trained(3, [40, 41, 44, 45, 21]) == [21], "two rows of before hold two each"
    assert trained(4, [0, 1, 2, 22]) == [0, 1, 2, 22], "of the subject of fact 0"
    assert trained(5, [40, 41, 42, 23]) == [23, 40, 41, 42], "of the subject of the first row"
