import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from sparsemem.config import MemoryConfig
from sparsemem.likelihood import IGNORE, label_log_probs
from sparsemem.memory.attach import attach_memory, find_blocks, find_ffn, pools
from sparsemem.memory.lookup import best_slots
from sparsemem.training.examples import Example, collate
from sparsemem.training.prefix import PrefixCache

VOCABULARY, WIDTH = 40, 16
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            initializer_range=0.2,
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=3, n_head=2, n_positions=32, initializer_range=0.2
        )
    ),
    "bloom": lambda: BloomForCausalLM(
        BloomConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, n_layer=3, n_head=2, initializer_range=0.2)
    ),
}


def make_examples(lengths):
    generator = torch.Generator().manual_seed(3)
    examples = []
    for number, length in enumerate(lengths):
        ids = tuple(torch.randint(3, VOCABULARY, (length,), generator=generator).tolist())
        labels = (IGNORE,) * (length // 2) + ids[length // 2 :]
        examples.append(Example(number, ids, labels, (False,) * length))
    return examples


@pytest.fixture(params=FAMILIES)
def model(request):
    torch.manual_seed(0)
    model = FAMILIES[request.param]().eval()
    attach_memory(
        model, MemoryConfig(layers=(1,), num_keys=4, num_heads=2, top_k=3, query_dim=4, relation_dim=0)
    )
    model.requires_grad_(False)
    pool = pools(model)["layer_1"]
    pool.write(torch.arange(16), torch.randn(16, WIDTH))
    pool.activate(torch.arange(3, 14))
    return model


def loss_and_gradient(model, batch, cache=None):
    (pool,) = pools(model).values()
    active = pool.active
    active.grad = None
    if cache is None:
        loss = -label_log_probs(model, *batch.model_inputs).sum()
    else:
        with cache.reuse(batch):
            loss = -label_log_probs(model, *batch.model_inputs).sum()
    loss.backward()
    return loss.detach(), active.grad


def count_calls(model, block):
    calls = []
    _, (first, _) = find_ffn(find_blocks(model)[block])
    first.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def test_loss_and_gradients_are_those_of_the_full_pass(model):
    batch, cache = collate(make_examples([5, 9, 3])), PrefixCache(model)
    expected = loss_and_gradient(model, batch)
    assert expected[1].abs().max() > 1e-3
    for _ in range(3):
        torch.testing.assert_close(loss_and_gradient(model, batch, cache), expected)


def test_examples_may_come_back_in_another_order_with_other_padding(model):
    examples, cache = make_examples([5, 9, 3, 7]), PrefixCache(model)
    for first in (examples[:2], examples[2:]):
        loss_and_gradient(model, collate(first), cache)
    calls = count_calls(model, 0)
    for mixed in ([3, 0], [2, 1, 0, 3], [2], [1, 2]):
        batch = collate([examples[i] for i in mixed])
        found = loss_and_gradient(model, batch, cache)
        assert not calls
        torch.testing.assert_close(found, loss_and_gradient(model, batch))
        calls.clear()


def asked_in_the_first_block(**options):
    torch.manual_seed(0)
    model = FAMILIES["llama"]().eval()
    shape = {"num_keys": 4, "num_heads": 2, "top_k": 3, "query_dim": 4, "relation_dim": 0}
    attach_memory(model, MemoryConfig(layers=(0,), **shape, **options))
    pools(model)["layer_0"].write(torch.arange(16), torch.randn(16, WIDTH))
    return model


def test_the_blocks_below_the_memory_run_once_and_the_others_each_time(model):
    batch, cache = collate(make_examples([5, 9])), PrefixCache(model)
    below, at, above = (count_calls(model, block) for block in range(3))
    for _ in range(3):
        loss_and_gradient(model, batch, cache)
    assert (len(below), len(at), len(above)) == (1, 3, 3)


def test_the_blocks_between_a_read_and_what_it_is_added_to_run_once_too():
    model = asked_in_the_first_block()
    pools(model)["layer_0"].activate(torch.arange(16))
    batch, cache = collate(make_examples([5, 9])), PrefixCache(model)
    expected = loss_and_gradient(model, batch)
    below, at, above = (count_calls(model, block) for block in range(3))
    for _ in range(3):
        torch.testing.assert_close(loss_and_gradient(model, batch, cache), expected)
    assert (len(below), len(at), len(above)) == (1, 3, 3)


def test_after_a_cached_pass_the_model_runs_every_block_again(model):
    batch, cache = collate(make_examples([5, 9])), PrefixCache(model)
    for _ in range(2):
        loss_and_gradient(model, batch, cache)
    with pytest.raises(KeyboardInterrupt), cache.reuse(batch):
        raise KeyboardInterrupt
    calls = count_calls(model, 0)
    model(input_ids=batch.input_ids)
    assert len(calls) == 1
    assert not any("forward" in vars(block) for block in find_blocks(model))


def beyond_the_budget(model, num_passes):
    """Run a batch of which memory has room for the first example alone.

    Returns the cache, the bytes of that example, and a list of the runs of the first block.
    """
    batch, of_first = collate(make_examples([5, 9, 3])), 5 * WIDTH * 4
    cache = PrefixCache(model, max_bytes=of_first + 8)
    calls = count_calls(model, 0)
    expected = loss_and_gradient(model, batch)
    for _ in range(num_passes):
        torch.testing.assert_close(loss_and_gradient(model, batch, cache), expected)
    return cache, of_first, calls


def test_what_is_beyond_the_budget_is_kept_on_disk(model):
    cache, of_first, calls = beyond_the_budget(model, num_passes=3)
    assert len(calls) == 2
    assert cache.shelf.num_bytes == of_first
    assert cache.shelf.num_bytes_on_disk > 0


def test_what_neither_memory_nor_disk_has_room_for_is_computed_anew(model, full_disk):
    cache, of_first, calls = beyond_the_budget(model, num_passes=2)
    assert len(calls) == 3
    assert cache.shelf.num_bytes == of_first
    assert cache.shelf.num_bytes_on_disk == 0
    loss_and_gradient(model, collate(make_examples([5, 9, 3])[:1]), cache)
    assert len(calls) == 3


def test_a_budget_of_nothing_keeps_nothing(model):
    batch, cache = collate(make_examples([5])), PrefixCache(model, max_bytes=0)
    calls = count_calls(model, 0)
    for _ in range(2):
        loss_and_gradient(model, batch, cache)
    assert len(calls) == 2
    assert cache.shelf.num_bytes == cache.shelf.num_bytes_on_disk == 0


def test_below_the_first_block_only_reads_are_kept():
    model = asked_in_the_first_block(output_depth=0.0)
    batch, cache = collate(make_examples([5, 3])), PrefixCache(model)
    for _ in range(2):
        with cache.reuse(batch), torch.no_grad():
            found = model(input_ids=batch.input_ids).logits
    expected = model(input_ids=batch.input_ids).logits
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1, :3], expected[1, :3])
    assert cache.shelf.num_bytes == (5 + 3) * 2 * 3 * (8 + 4)


def test_slots_are_looked_up_once_per_example(model, monkeypatch):
    batch, cache, looked_up = collate(make_examples([5, 9])), PrefixCache(model), []
    monkeypatch.setattr(
        "sparsemem.memory.layer.best_slots",
        lambda *args: looked_up.append(1) or best_slots(*args),
    )
    for _ in range(3):
        loss_and_gradient(model, batch, cache)
    assert len(looked_up) == 1
    loss_and_gradient(model, batch)
    assert len(looked_up) == 2
