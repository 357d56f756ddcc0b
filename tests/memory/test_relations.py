"""Rows that belong to a name and answer one question about it."""

import copy
import math

import pytest
import torch
from tests.memory.test_families import make_model

from sparsemem.config import MemoryConfig
from sparsemem.errors import CheckpointError, ConfigError
from sparsemem.memory.attach import attach_memory, before_read, detach_memory, memory_layers, pools
from sparsemem.memory.base_model import load_base_model
from sparsemem.memory.checkpoint import load, save
from sparsemem.memory.layer import DOUBT, FADES_IN

VOCABULARY, WIDTH, RELATION = 40, 16, 6
CONFIG = MemoryConfig(
    layers=(1,), output_depth=0.5, num_keys=8, num_heads=2, top_k=4, query_dim=4, relation_dim=RELATION
)
FAMILIES = ("llama", "gpt2")


def untaught(family):
    shape = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 4, "initializer_range": 0.2}
    return make_model(family, **shape)


@pytest.fixture(params=FAMILIES)
def model(request):
    return attach_memory(untaught(request.param), CONFIG)


@pytest.fixture
def ids():
    return torch.randint(3, VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def reads_at(model, ids, position):
    found = []
    with before_read(model, lambda _, reads: found.append(reads.slot_ids[0, position].flatten().unique())):
        model(input_ids=ids, use_cache=False)
    return found[0]


def teach(model, slot_ids, name, num_rows=1, seed=0, width=WIDTH):
    """Write rows of one name, which share its slots."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_rows, 1 + RELATION + width, generator=generator)
    rows[:, 0] = name
    (pool,) = pools(model).values()
    pool.write(slot_ids, rows, torch.arange(len(slot_ids)) % num_rows)
    return rows


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids, use_cache=False).logits[0]


def test_logits_are_the_same_until_something_is_written(ids):
    model = untaught("llama")
    before = logits(model, ids)
    assert torch.equal(logits(attach_memory(model, CONFIG), ids), before)


def test_tokens_before_a_name_keep_their_logits_bit_for_bit_and_those_behind_do_not(model, ids):
    before = logits(model, ids)
    teach(model, reads_at(model, ids, 5), name=3)
    first = next(place for place in range(12) if named(model, ids)[place])
    after = logits(model, ids)
    assert first <= 5
    assert torch.equal(after[:first], before[:first])
    assert (after[5:] != before[5:]).any(dim=1).all()


@torch.no_grad()
def named(model, ids):
    (layer,) = memory_layers(model)
    model(input_ids=ids, use_cache=False)
    return [bool(token[:, 1].any()) for token in layer.beside.answer[0]]


@pytest.mark.usefixtures("every_state_asks")
def test_the_answer_is_a_softmax_over_the_rows_of_the_names_read_and_nothing(model):
    (layer,) = memory_layers(model)
    rows = teach(model, torch.arange(6), name=3, num_rows=2)
    teach(model, torch.arange(6, 9), name=4)
    layer.value_scale.fill_(0.5)
    hidden = torch.randn(1, 4, WIDTH)
    names = torch.zeros(1, 4, 6, 2)
    names[0, 1, 0] = torch.tensor([3, 0.9])
    names[0, 2, 0] = torch.tensor([3, 0.8])
    names[0, 3, 0] = torch.tensor([3, 1.0])
    found = layer.answer(hidden, names)
    assert torch.equal(found[0, 0], hidden[0, 0])
    for place, certainty in ((1, 0.9**DOUBT), (2, 0.9**DOUBT * math.exp(-1 / FADES_IN)), (3, 1.0)):
        query = torch.nn.functional.normalize(layer.relation(hidden[0, place]), dim=0)
        scores = [math.exp((query @ row[1 : 1 + RELATION]).item()) * certainty for row in rows]
        total = sum(scores) + 1
        expected = sum(score / total * row[1 + RELATION :] for score, row in zip(scores, rows, strict=True))
        torch.testing.assert_close(found[0, place], hidden[0, place] + 0.5 * expected)


def test_a_slot_speaks_for_its_name_however_many_rows_that_has(model, ids):
    slot_ids = reads_at(model, ids, 5)
    teach(model, slot_ids, name=3, num_rows=1)
    as_one = named(model, ids)
    teach(model, slot_ids, name=3, num_rows=len(slot_ids))
    assert named(model, ids) == as_one
    assert as_one[5]


@torch.no_grad()
def test_where_rows_lie_changes_no_bit(model, ids):
    slot_ids = reads_at(model, ids, 5)
    rows = teach(model, slot_ids, name=3, num_rows=6)
    rows[:, 1 + RELATION :] *= 1000  # so that all of them are heard
    (pool,) = pools(model).values()
    index = torch.arange(len(slot_ids)) % 6
    found = []
    for order in (torch.arange(6), torch.arange(6).flip(0), torch.tensor([3, 1, 5, 0, 4, 2])):
        pool.write(slot_ids, torch.zeros_like(rows)[:1].expand(len(slot_ids), -1))
        assert not len(pool.rows)
        pool.write(slot_ids, rows[order], order.argsort()[index])
        found.append((pool.rows, logits(model, ids)))
    assert not torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(one, found[0][1]) for _, one in found)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generate_with_a_cache_equals_without(model, ids, options):
    teach(model, reads_at(model, ids, 5), name=3, num_rows=2)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **options}
    mask = torch.ones_like(ids)
    cached = model.generate(input_ids=ids, attention_mask=mask, use_cache=True, **options)
    assert torch.equal(cached, model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **options))


def test_names_of_a_copied_and_repeated_cache_go_on_counting(model, ids):
    teach(model, reads_at(model, ids, 5), name=3)
    with torch.no_grad():
        begun = model(input_ids=ids[:, :8], use_cache=True).past_key_values
        kept = copy.deepcopy(begun)
        kept.batch_repeat_interleave(2)
        found = model(input_ids=ids[:, 8:].repeat(2, 1), past_key_values=kept, use_cache=True).logits
    expected = logits(model, ids)[8:]
    torch.testing.assert_close(found, torch.stack([expected, expected]), rtol=1e-4, atol=1e-5)


def test_a_cache_gets_no_further_layer_before_a_name_is_read(model, ids):
    slot_ids, at_first = reads_at(model, ids, 5), reads_at(model, ids, 0)
    teach(model, slot_ids[~torch.isin(slot_ids, at_first)], name=3)
    first = named(model, ids).index(True)
    assert first > 0
    with torch.no_grad():
        before = model(input_ids=ids[:, :first], use_cache=True).past_key_values
        behind = model(input_ids=ids[:, : first + 1], use_cache=True).past_key_values
    assert (len(before.layers), len(behind.layers)) == (4, 5)


def test_gradients_reach_the_values_of_the_names_read_and_no_key_or_name(model, ids):
    (pool,) = pools(model).values()
    slot_ids = reads_at(model, ids, 5)
    teach(model, slot_ids, name=3, num_rows=2)
    read = torch.cat([reads_at(model, ids, place) for place in range(12)])
    others = torch.tensor([slot for slot in range(64) if slot not in read][:2])
    teach(model, others, name=9, seed=1)
    active = pool.activate(
        torch.cat([slot_ids, others]), torch.tensor([*(100 + torch.arange(len(slot_ids)) % 2), 200, 200])
    )
    model(input_ids=ids, use_cache=False).logits.square().sum().backward()
    assert active.grad[:2, 1 + RELATION :].abs().sum(dim=1).gt(0).all()
    assert not active.grad[:, : 1 + RELATION].any()
    assert not active.grad[2].any()


@pytest.mark.parametrize(
    "options",
    [{"layers": (1, 2)}, {"placement": "replace"}, {"output_depth": 0.0}, {"quorum": 0.0}],
    ids=str,
)
def test_relations_need_one_memory_that_answers_above_its_reads(options):
    with pytest.raises(ConfigError, match="relation_dim=8 needs"):
        MemoryConfig(relation_dim=8, **options)


def test_a_memory_with_relations_is_what_it_was_when_loaded_again(model_folder, tmp_path, ids):
    model, _ = load_base_model(str(model_folder))
    attach_memory(model, CONFIG)
    teach(model, reads_at(model, ids, 5), name=3, num_rows=2, width=32)
    save(model, tmp_path / "memory", str(model_folder))
    loaded, _ = load(tmp_path / "memory")
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    assert named(loaded, ids) == named(model, ids)


def test_a_folder_whose_keys_score_otherwise_is_refused(model_folder, tmp_path):
    model, _ = load_base_model(str(model_folder))
    save(attach_memory(model, CONFIG), tmp_path / "memory", str(model_folder))
    path = tmp_path / "memory" / "memory_config.json"
    path.write_text(path.read_text().replace('"format_version": 4', '"format_version": 3'))
    with pytest.raises(CheckpointError, match="rows score otherwise; attach anew"):
        load(tmp_path / "memory")


def test_relations_are_as_wide_as_the_model_by_default_and_none_where_they_cannot_be():
    shape = {"num_keys": 8, "num_heads": 2, "top_k": 4, "query_dim": 4}
    for options, expected in (
        ({"layers": (1,)}, WIDTH),
        ({"layers": (0, 1)}, 0),
        ({"layers": (3,)}, 0),
        ({"quorum": 0.0}, 0),
    ):
        model = attach_memory(untaught("llama"), MemoryConfig(**shape, **options))
        assert {layer.relation_dim for layer in memory_layers(model)} == {expected}
    for options, reason in (
        ({"relation_dim": 17}, "the model is 16 wide"),
        ({"layers": (3,)}, "no block is left"),
    ):
        with pytest.raises(ConfigError, match=reason):
            attach_memory(untaught("llama"), MemoryConfig(**shape, **({"relation_dim": 8} | options)))


def test_a_copy_answers_by_itself(model, ids):
    before = logits(model, ids)
    copied = copy.deepcopy(model)
    teach(copied, reads_at(copied, ids, 5), name=3)
    assert not torch.equal(logits(copied, ids), before)
    assert torch.equal(logits(model, ids), before)
    assert torch.equal(logits(detach_memory(copied), ids), before)
