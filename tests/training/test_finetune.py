import copy
import dataclasses
import random

import pytest
import torch

from sparsemem.config import FinetuneConfig, MemoryConfig
from sparsemem.data import Fact
from sparsemem.errors import ConfigError
from sparsemem.likelihood import label_log_probs
from sparsemem.memory.attach import attach_memory, before_read, find_blocks, memory_layers, pools
from sparsemem.memory.delta import SparseDelta
from sparsemem.slots.usage import count_usage
from sparsemem.training.examples import collate
from sparsemem.training.finetune import build_examples, finetune
from sparsemem.training.methods import ANCHORS

from .conftest import USAGE_OPTIONS, equal, falls

# PEFT asks transformers for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

SHAPE = {"num_keys": 8, "num_heads": 2, "top_k": 4, "query_dim": 4}


def outside(rows, delta):
    """The rows of every slot that `delta` does not hold, by pool."""
    kept = {}
    for name, values in rows.items():
        mask = torch.ones(len(values), dtype=torch.bool)
        if name in delta.changes:
            mask[delta.changes[name].slot_ids] = False
        kept[name] = values[mask]
    return kept


def ids_of(delta):
    return {name: change.slot_ids.tolist() for name, change in delta.changes.items()}


def check_update(model, tokenizer, facts, usage, config, all_rows, logits_of):
    """What holds after every update of a memory: see DESIGN.md, section 5."""
    rows, logits = all_rows(model), logits_of(model)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    result = finetune(model, tokenizer, facts, usage, config)
    trained_rows = all_rows(model)
    assert result.model is model
    assert falls(result, config)
    assert result.delta.num_slots_trained > 0
    assert equal(outside(trained_rows, result.delta), outside(rows, result.delta))
    assert equal(weights, dict(model.named_parameters()))
    assert result.num_trained == result.delta.num_values
    assert not torch.equal(logits_of(model), logits)
    result.delta.invert().apply(pools(model))
    assert equal(all_rows(model), rows)
    assert torch.equal(logits_of(model), logits)
    result.delta.apply(pools(model))
    assert equal(all_rows(model), trained_rows)
    return result


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"facts_per_batch": 4, "gradient_accumulation_steps": 3},
        {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.01},
        {"ranking": "kl", "anchor": "all", "loss_on": "all"},
        {"prefix_cache_bytes": 0, "num_contexts": 2, "lr_scheduler": "cosine"},
    ],
    ids=lambda options: " ".join(options) or "default",
)
def test_the_loss_falls_and_only_the_delta_moves_and_it_can_be_taken_back(
    attached, tiny_tokenizer, facts, usage, config, all_rows, logits_of, options
):
    config = dataclasses.replace(config, **options)
    check_update(attached, tiny_tokenizer, facts, usage, config, all_rows, logits_of)


@pytest.mark.parametrize(
    "place",
    [
        {"layers": (0,)},
        {"layers": (0, 2)},
        {"layers": (1, 2), "shared_pool": True},
        {"layers": (0, 1, 2), "shared_pool": True},
        {"layers": (1,), "placement": "replace", "value_dim": 16},
    ],
    ids=str,
)
@pytest.mark.parametrize("num_parts", [1, 2])
def test_every_place_of_the_memory_learns(
    tiny_model, tiny_tokenizer, texts, facts, config, all_rows, logits_of, place, num_parts
):
    attach_memory(tiny_model, MemoryConfig(**place, **SHAPE))
    usage = count_usage(tiny_model, tiny_tokenizer, texts, **USAGE_OPTIONS)
    config = dataclasses.replace(config, gradient_accumulation_steps=num_parts)
    result = check_update(tiny_model, tiny_tokenizer, facts, usage, config, all_rows, logits_of)
    assert set(result.delta.changes) == set(pools(tiny_model))


def test_a_second_update_starts_from_the_first(
    attached, tiny_tokenizer, facts, usage, config, all_rows, logits_of
):
    start = all_rows(attached)
    first = finetune(attached, tiny_tokenizer, facts[:2], usage, config).delta
    second = check_update(attached, tiny_tokenizer, facts[2:], usage, config, all_rows, logits_of).delta
    for delta in (second, first):
        delta.invert().apply(pools(attached))
    assert equal(all_rows(attached), start)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_accumulated_parts_train_as_one_batch(attached, tiny_tokenizer, facts, usage, config, optimizer):
    config = dataclasses.replace(config, facts_per_batch=4, optimizer=optimizer, anchor="all")
    deltas = []
    for num_parts in (1, 2, 4):
        config = dataclasses.replace(config, gradient_accumulation_steps=num_parts)
        deltas.append(finetune(copy.deepcopy(attached), tiny_tokenizer, facts, usage, config).delta)
    for delta in deltas[1:]:
        assert ids_of(delta) == ids_of(deltas[0])
        after = delta.changes["layer_1"].after
        torch.testing.assert_close(after, deltas[0].changes["layer_1"].after, rtol=0, atol=1e-5)


def test_slots_are_chosen_in_the_forward_pass_of_the_step(attached, tiny_tokenizer, usage, config):
    calls = {"below": [], "reads": [], "above": []}
    blocks = find_blocks(attached)
    blocks[0].mlp.register_forward_pre_hook(lambda *_: calls["below"].append(1))
    blocks[2].mlp.register_forward_pre_hook(lambda *_: calls["above"].append(1))
    next(memory_layers(attached)).query.register_forward_pre_hook(lambda *_: calls["reads"].append(1))
    one_part = [Fact(statement="Jov left and never came back.", subject="Jov")]
    result = finetune(attached, tiny_tokenizer, one_part, usage, dataclasses.replace(config, held_per_step=8))
    assert len(result.losses) == config.num_epochs == 3
    assert {place: len(of) for place, of in calls.items()} == {"below": 1, "reads": 1, "above": 3 + 1}


def slots_read(model, tokenizer, facts, usage, config):
    """Slots read at the last token of a subject, at all its tokens, and at all tokens, by any wording."""
    by_fact = build_examples(facts, tokenizer, usage, config)
    batch = collate([example for examples in by_fact for example in examples])
    read = {}

    def keep(_layer, reads):
        for anchor, counts in ANCHORS.items():
            read[anchor] = set(reads.slot_ids[counts(batch.is_subject)].flatten().tolist())
        read["all"] = set(reads.slot_ids[batch.attention_mask.bool()].flatten().tolist())

    with before_read(model, keep), torch.no_grad():
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    assert read["subject_end"] <= read["subject_tail"] <= read["subject"] < read["all"]
    return read


def test_anchors_are_parts_of_each_span():
    marks = torch.tensor([[0, 1, 1, 1, 0, 1, 0], [1, 1, 0, 0, 0, 0, 1]]).bool()
    kept = {name: anchor(marks).int().tolist() for name, anchor in ANCHORS.items()}
    assert kept["subject"] == marks.int().tolist()
    assert kept["subject_tail"] == [[0, 0, 1, 1, 0, 1, 0], [0, 1, 0, 0, 0, 0, 1]]
    assert kept["subject_end"] == [[0, 0, 0, 1, 0, 1, 0], [0, 1, 0, 0, 0, 0, 1]]


@pytest.mark.parametrize("anchor", [*ANCHORS, "all"])
@pytest.mark.parametrize("num_parts", [1, 3])
def test_the_anchor_decides_which_tokens_choose_slots(
    attached, tiny_tokenizer, facts, usage, config, anchor, num_parts
):
    config = dataclasses.replace(
        config, ranking="tf", top_t=64, anchor=anchor, gradient_accumulation_steps=num_parts
    )
    read = slots_read(attached, tiny_tokenizer, facts[:1], usage, config)
    delta = finetune(attached, tiny_tokenizer, facts[:1], usage, config).delta
    assert set(ids_of(delta)["layer_1"]) == read[anchor]


def test_a_fact_without_a_subject_is_anchored_everywhere(attached, tiny_tokenizer, usage, config):
    config = dataclasses.replace(config, ranking="tf", top_t=64)
    facts = [Fact(statement="It was cold.", subject="nowhere")]
    by_fact = build_examples(facts, tiny_tokenizer, usage, config)
    assert not any(by_fact[0][0].is_subject)
    delta = finetune(attached, tiny_tokenizer, facts, usage, config).delta
    everywhere = finetune(attached, tiny_tokenizer, facts, usage, dataclasses.replace(config, anchor="all"))
    assert ids_of(delta) == ids_of(everywhere.delta)


@pytest.mark.parametrize("anchor", ["subject", "all"])
@pytest.mark.parametrize("num_parts", [1, 2])
def test_each_fact_of_a_batch_gets_its_own_top_t(
    attached, tiny_tokenizer, facts, usage, config, anchor, num_parts
):
    config = dataclasses.replace(
        config,
        ranking="tf",
        # Whole numbers: weights differ in the last digit with the padding, and decide ties.
        weighted_reads=False,
        top_t=3,
        num_epochs=1,
        facts_per_batch=4,
        anchor=anchor,
        gradient_accumulation_steps=num_parts,
    )
    alone = []
    for fact in facts:
        delta = finetune(copy.deepcopy(attached), tiny_tokenizer, [fact], usage, config).delta
        assert delta.num_slots_trained == 3
        alone += ids_of(delta)["layer_1"]
    together = finetune(attached, tiny_tokenizer, facts, usage, config).delta
    assert ids_of(together)["layer_1"] == sorted(set(alone))


def test_common_slots_can_be_ruled_out(attached, tiny_tokenizer, facts, usage, config):
    config = dataclasses.replace(config, ranking="tf", anchor="all", top_t=64, max_document_frequency=0.5)
    delta = finetune(attached, tiny_tokenizer, facts, usage, config).delta
    background = usage.pools["layer_1"]
    trained = background.document_frequency[delta.changes["layer_1"].slot_ids]
    assert (trained <= 0.5 * background.num_documents).all()
    assert (background.document_frequency > 0.5 * background.num_documents).any()


def train_densely(model, tokenizer, facts, config):
    """The same loss on all slots by torch's SGD; returns all rows."""
    torch.manual_seed(0)
    rng = random.Random(config.seed)
    by_fact = build_examples(facts, tokenizer, None, config)
    pool = pools(model)["layer_1"]
    rows = pool.activate(torch.arange(pool.num_slots))
    optimizer = torch.optim.SGD([rows], lr=config.lr, momentum=config.momentum)
    for _ in range(config.num_epochs):
        order = rng.sample(range(len(by_fact)), len(by_fact))
        for start in range(0, len(order), config.facts_per_batch):
            chosen = order[start : start + config.facts_per_batch]
            batch = collate([example for index in chosen for example in by_fact[index]])
            loss = -label_log_probs(model, *batch.model_inputs).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    pool.deactivate()
    return pool.current(torch.arange(pool.num_slots))


@pytest.mark.parametrize(
    "batching", [{"facts_per_batch": 1}, {"facts_per_batch": 4, "momentum": 0.9}], ids=str
)
def test_training_every_slot_is_dense_training(attached, tiny_tokenizer, facts, usage, config, batching):
    config = dataclasses.replace(
        config,
        optimizer="sgd",
        learning_rate=0.5,
        top_t=64,
        ranking="tf",
        anchor="all",
        penalty="none",
        **batching,
    )
    # Subjects are given or none: the reference looks for none itself.
    facts = [dataclasses.replace(fact, subject=fact.subject or "Xix") for fact in facts]
    dense = train_densely(copy.deepcopy(attached), tiny_tokenizer, facts, config)
    finetune(attached, tiny_tokenizer, facts, usage, config)
    sparse = pools(attached)["layer_1"].current(torch.arange(64))
    assert dense.abs().max() > 0.01
    torch.testing.assert_close(sparse, dense, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["lorra", "Memory", ""])
def test_an_unknown_method_is_named(attached, tiny_tokenizer, facts, usage, config, method):
    with pytest.raises(ConfigError, match=f"method='{method}' is unknown; use memory, full or"):
        finetune(attached, tiny_tokenizer, facts, usage, dataclasses.replace(config, method=method))


def test_an_unknown_schedule_is_named_and_nothing_moves(
    attached, tiny_tokenizer, facts, usage, config, all_rows
):
    rows = all_rows(attached)
    with pytest.raises(ConfigError, match="lr_scheduler='nonsense'"):
        finetune(attached, tiny_tokenizer, facts, usage, dataclasses.replace(config, lr_scheduler="nonsense"))
    assert equal(all_rows(attached), rows)
    assert all(p.requires_grad for p in attached.parameters())


def test_one_seed_gives_one_delta_and_another_another(attached, tiny_tokenizer, facts, usage, config):
    def digest(seed):
        seeded = dataclasses.replace(config, seed=seed, num_contexts=2)
        return finetune(copy.deepcopy(attached), tiny_tokenizer, facts, usage, seeded).delta.digest

    assert digest(1) == digest(1)
    assert len({digest(seed) for seed in range(4)}) > 1


def test_the_model_is_evaluated_after_each_epoch_as_it_is_then(
    attached, tiny_tokenizer, facts, usage, config, all_rows
):
    seen = []

    def evaluate(model):
        seen.append(all_rows(model)["layer_1"])
        return len(seen)

    result = finetune(attached, tiny_tokenizer, facts, usage, config, evaluate=evaluate)
    assert result.evaluations == ((1, 1), (2, 2), (3, 3))
    assert torch.equal(seen[-1], all_rows(attached)["layer_1"])
    assert not torch.equal(seen[0], seen[-1])


def test_evaluating_changes_nothing(attached, tiny_tokenizer, facts, usage, config, logits_of):
    plain = finetune(copy.deepcopy(attached), tiny_tokenizer, facts, usage, config)
    watched = finetune(attached, tiny_tokenizer, facts, usage, config, evaluate=logits_of)
    assert plain.delta.digest == watched.delta.digest


def test_each_step_is_reported(attached, tiny_tokenizer, facts, usage, config):
    seen = []
    result = finetune(attached, tiny_tokenizer, facts, usage, config, on_step=lambda *step: seen.append(step))
    assert seen == [(number, 6, loss) for number, loss in enumerate(result.losses, 1)]


def test_the_prefix_cache_changes_no_row(attached, tiny_tokenizer, facts, usage, config):
    rows = []
    for size in (0, FinetuneConfig().prefix_cache_bytes):
        sized = dataclasses.replace(config, prefix_cache_bytes=size, optimizer="sgd")
        delta = finetune(copy.deepcopy(attached), tiny_tokenizer, facts, usage, sized).delta
        assert isinstance(delta, SparseDelta)
        rows.append(delta.changes["layer_1"].after)
    torch.testing.assert_close(*rows, rtol=0, atol=1e-6)


def test_a_copy_learns_apart_from_its_original(
    attached, tiny_tokenizer, facts, usage, config, all_rows, logits_of
):
    rows, logits, twin = all_rows(attached), logits_of(attached), copy.deepcopy(attached)
    finetune(twin, tiny_tokenizer, facts, usage, config)
    assert equal(all_rows(attached), rows)
    assert torch.equal(logits_of(attached), logits)
    assert not torch.equal(logits_of(twin), logits)


@pytest.mark.parametrize("method", ["memory", "full"])
def test_the_mean_gradient_lasts_as_long_as_the_options_say(
    attached, tiny_tokenizer, facts, usage, config, method
):
    losses = [
        finetune(copy.deepcopy(attached), tiny_tokenizer, facts, usage, of_run).losses
        for beta1 in (None, 0.5, 0.9)
        for of_run in [dataclasses.replace(config, method=method, adam_beta1=beta1)]
    ]
    default, shorter, longer = losses
    assert shorter != longer
    assert default == (shorter if method == "memory" else longer)
