"""Running examples behind what is kept of their first tokens gives what running them whole does."""

import pytest
import torch
from tests.memory.test_families import FAMILIES, make_model, memory

from sparsemem.likelihood import IGNORE, label_log_probs
from sparsemem.memory.attach import attach_memory, observe_reads, pools
from sparsemem.training.examples import Example, collate, collate_parts
from sparsemem.training.prefix import PrefixCache

pytestmark = pytest.mark.usefixtures("every_state_asks")

PLACES = [(5, 9), (0, 4), (7, 12), (3, 5)]
"""Where the subject of each example begins, and how long the example is."""


def make_examples(places=PLACES):
    generator = torch.Generator().manual_seed(3)
    examples = []
    for number, (start, length) in enumerate(places):
        ids = tuple(torch.randint(3, 97, (length,), generator=generator).tolist())
        labels = (IGNORE,) * (start + 1) + ids[start + 1 :] if start + 1 < length else (IGNORE,) * length
        examples.append(Example(number, ids, labels, tuple(place >= start for place in range(length))))
    return examples


@pytest.fixture(params=[*FAMILIES, "gemma3_text"])
def model(request):
    more = {
        "gemma3_text": {"head_dim": 8, "num_key_value_heads": 2, "sliding_window": 4, "intermediate_size": 64}
    }
    return prepared(make_model(request.param, **more.get(request.param, {})))


def prepared(model, quorum=0.5):
    attach_memory(model, memory(quorum=quorum, num_keys=32))
    return model.requires_grad_(False)


def teach(model, examples, value=1.0):
    """Let the memory answer the subjects of the examples, and nothing before them."""
    pool, own, before = pools(model)["layer_1"], [], []
    for example in examples:
        observe_reads(
            model,
            lambda _, reads, start=example.start: (
                own.append(reads.slot_ids[0, start:].flatten()),
                before.append(reads.slot_ids[0, :start].flatten()),
            ),
            input_ids=collate([example]).input_ids,
        )
    slots = torch.cat(own).unique()
    slots = slots[~torch.isin(slots, torch.cat(before))]
    pool.deactivate()
    pool.activate(slots, torch.full_like(slots, pool.num_slots))
    with torch.no_grad():
        pool.active.fill_(value)
    return slots


def loss_and_gradient(model, examples, cache=None):
    """Loss, gradient, and how many tokens the block of the memory ran."""
    active, counted = pools(model)["layer_1"].active, []
    active.grad = None
    batch = collate(examples)
    head = model.get_output_embeddings().register_forward_pre_hook(
        lambda _m, args: counted.append(args[0].shape)
    )
    if cache is None:
        loss = -label_log_probs(model, *batch.model_inputs).sum()
    else:
        with cache.resume(batch) as run:
            loss = -label_log_probs(model, *run.model_inputs, **run.others).sum()
            assert run.examples == tuple(examples)
    head.remove()
    loss.backward()
    return loss.detach(), active.grad, counted[0][1]


def assert_same(model, examples, cache):
    *expected, all_tokens = loss_and_gradient(model, examples)
    *found, tokens = loss_and_gradient(model, examples, cache)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    return tokens < all_tokens


def test_loss_and_gradients_are_those_of_the_whole_examples(model):
    examples, cache = make_examples(), PrefixCache(model)
    teach(model, examples)
    assert loss_and_gradient(model, examples)[1].abs().max() > 1e-3
    cuts = [assert_same(model, [examples[i] for i in order], cache) for order in ([2, 0], [0, 1, 2, 3], [3])]
    teach(model, examples, value=-2.0)
    cuts.append(assert_same(model, examples, cache))
    # Bloom takes no places of tokens.
    assert cuts == [model.config.model_type != "bloom"] * 4


def test_an_example_is_run_whole_while_the_memory_speaks_before_its_subject():
    model = prepared(make_model("llama"))
    (named,) = make_examples([(5, 9)])
    # Behind a start of 9, what names the subject of the first.
    spoken = Example(
        2, (*named.input_ids[::-1], 5, 6, 7), (IGNORE,) * 10 + (6, 7), (False,) * 9 + (True,) * 3
    )
    cache = PrefixCache(model)
    is_cut = []
    for taught in (spoken, spoken, named):
        teach(model, [taught])
        is_cut.append(assert_same(model, [spoken], cache))
    assert is_cut == [True, True, False]
    fresh = PrefixCache(model)
    assert not any(assert_same(model, [spoken], fresh) for _ in range(2))
    assert not fresh.past._kept


@pytest.mark.parametrize(("share", "is_cut"), [(0, False), (0.3, False), (1, True)])
def test_where_there_is_no_room_for_keys_and_values_examples_run_whole(share, is_cut, full_disk):
    model = prepared(make_model("llama"))
    examples = make_examples([(7, 12)])
    teach(model, examples)
    whole = PrefixCache(model)
    assert_same(model, examples, whole)
    cache = PrefixCache(model, max_bytes=int(share * whole.shelf.num_bytes))
    assert_same(model, examples, cache)
    assert assert_same(model, examples, cache) == is_cut


def test_keys_and_values_on_disk_are_as_good():
    model = prepared(make_model("llama"))
    examples = make_examples()
    teach(model, examples)
    cache = PrefixCache(model, max_bytes=1)
    assert_same(model, examples, cache)
    assert assert_same(model, examples, cache)
    assert cache.shelf.num_bytes == 0


def test_models_whose_past_is_more_than_keys_and_values_run_whole():
    model = prepared(make_model("llama"))
    assert PrefixCache(model).num_run(make_examples()[0]) == 4
    model.config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    assert PrefixCache(model).num_run(make_examples()[0]) == 9


def test_with_several_layers_examples_run_whole():
    model = make_model("llama")
    attach_memory(model, memory(layers=(0, 2)))
    assert PrefixCache(model).num_run(make_examples()[0]) == 9


def test_examples_are_batched_by_the_tokens_that_run():
    model, examples = prepared(make_model("llama")), make_examples([(0, 3), (9, 12), (1, 12)])
    by_run = collate_parts(examples, 1, length=PrefixCache(model).num_run)
    assert [[e.fact_index for e in part.examples] for part in by_run] == [[1, 0], [2]]
    assert [[e.fact_index for e in part.examples] for part in collate_parts(examples, 1)] == [[0], [2, 1]]
