import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file

import sparsemem.files
from sparsemem.config import MemoryConfig
from sparsemem.errors import (
    CheckpointError,
    DataError,
    MissingFileError,
    NotAttachedError,
    OutputError,
    PoolMismatchError,
)
from sparsemem.memory.attach import attach_memory, before_read, detach_memory, memory_layers, pools
from sparsemem.memory.checkpoint import load, save
from sparsemem.memory.fit_keys import fit_keys
from sparsemem.prompts import background_documents
from sparsemem.slots.directions import NUM_DOCUMENTS
from sparsemem.slots.usage import FORMAT_VERSION, count_usage, keys_digest, load_usage, save_usage

HEADS, TOP_K, SLOTS = 2, 4, 64
MEMORY = {"num_keys": 8, "num_heads": HEADS, "top_k": TOP_K, "query_dim": 4}


@pytest.fixture
def uneven(texts):
    """Documents of very different lengths, more than a batch."""
    return [text[: 4 + 9 * (number % 7)] for number, text in enumerate(texts[:11])]


def same_usage(first, second):
    return (
        same_counts(first, second)
        and first.directions.keys() == second.directions.keys()
        and all(torch.equal(axes, second.directions[name]) for name, axes in first.directions.items())
    )


def same_counts(first, second):
    return (
        first.pools.keys() == second.pools.keys()
        and all(
            torch.equal(first.pools[name].reads, second.pools[name].reads)
            and torch.equal(first.pools[name].document_frequency, second.pools[name].document_frequency)
            and dataclasses.astuple(first.pools[name])[2:] == dataclasses.astuple(second.pools[name])[2:]
            for name in first.pools
        )
        and torch.equal(first.token_document_frequency, second.token_document_frequency)
        and (first.num_documents, first.num_tokens, first.keys_digest)
        == (second.num_documents, second.num_tokens, second.keys_digest)
    )


def slow_usage(model, tokenizer, documents, max_length=256):
    """Counts with Python sets, one document at a time: no batch, no padding."""
    reads = {name: [0] * SLOTS for name in pools(model)}
    frequency = {name: [0] * SLOTS for name in pools(model)}
    tokens = [0] * model.config.vocab_size
    for document in documents:
        ids = tokenizer(document)["input_ids"][:max_length]
        seen = {name: [] for name in reads}
        with before_read(
            model,
            lambda layer, read, seen=seen: seen[layer.pool_name].extend(read.slot_ids.flatten().tolist()),
        ):
            model(torch.tensor([ids]))
        for name, slots in seen.items():
            for slot in slots:
                reads[name][slot] += 1
            for slot in set(slots):
                frequency[name][slot] += 1
        for token in set(ids):
            tokens[token] += 1
    return reads, frequency, tokens


@pytest.mark.parametrize(
    "options",
    [{"layers": (1,)}, {"layers": (0, 2)}, {"layers": (0, 2), "shared_pool": True}],
    ids=["one layer", "own pools", "shared pool"],
)
def test_usage_equals_a_slow_count_per_document(tiny_model, tiny_tokenizer, uneven, options):
    model = attach_memory(tiny_model, MemoryConfig(**MEMORY, **options))
    usage = count_usage(model, tiny_tokenizer, uneven, prompt_formats=False)
    reads, frequency, tokens = slow_usage(model, tiny_tokenizer, uneven)
    assert usage.pools.keys() == reads.keys()
    for name, pool in usage.pools.items():
        assert pool.reads.tolist() == reads[name]
        assert pool.document_frequency.tolist() == frequency[name]
        assert (pool.num_documents, pool.num_slots) == (len(uneven), SLOTS)
        assert pool.total_reads == sum(reads[name])
    assert usage.token_document_frequency.tolist() == tokens
    assert usage.num_documents == len(uneven)


def test_documents_in_prompt_formats_are_counted_as_they_are_written(attached, tiny_tokenizer, texts):
    documents = list(background_documents(texts[:6], tiny_tokenizer))
    usage = count_usage(attached, tiny_tokenizer, texts[:6], max_length=100)
    _, frequency, tokens = slow_usage(attached, tiny_tokenizer, documents, max_length=100)
    assert usage.pools["layer_1"].document_frequency.tolist() == frequency["layer_1"]
    assert usage.token_document_frequency.tolist() == tokens


def test_padding_is_not_counted(attached, tiny_tokenizer, uneven):
    usage = count_usage(attached, tiny_tokenizer, uneven, prompt_formats=False)
    assert usage.num_tokens == sum(len(tiny_tokenizer(text)["input_ids"]) for text in uneven)
    assert usage.pools["layer_1"].total_reads == usage.num_tokens * HEADS * TOP_K
    assert usage.token_document_frequency[tiny_tokenizer.pad_token_id] == 0


def test_batch_boundaries_do_not_matter(attached, tiny_tokenizer, uneven):
    count = lambda texts: count_usage(attached, tiny_tokenizer, texts, prompt_formats=False)
    # Every order puts other documents side by side, under other padding. (Axes are sums of floats.)
    assert same_counts(count(uneven), count(uneven[::-1]))
    assert same_counts(count(uneven), count(sorted(uneven, key=len)))
    parts = [count(uneven[:3]), count(uneven[3:])]
    whole = count(uneven).pools["layer_1"]
    assert torch.equal(sum(part.pools["layer_1"].reads for part in parts), whole.reads)
    frequencies = sum(part.pools["layer_1"].document_frequency for part in parts)
    assert torch.equal(frequencies, whole.document_frequency)


def test_how_many_documents_are_tokenized_at_a_time_does_not_matter(
    attached, tiny_tokenizer, uneven, monkeypatch
):
    count = lambda: count_usage(attached, tiny_tokenizer, uneven, num_documents=10, prompt_formats=False)
    at_once = count()
    monkeypatch.setattr("sparsemem.slots.usage.WINDOW", 3)
    assert same_usage(count(), at_once)


@pytest.mark.parametrize("wanted", [1, 5, 8, 9, 11, 500])
def test_num_documents_bounds_what_is_counted(attached, tiny_tokenizer, uneven, wanted):
    steps = []
    usage = count_usage(
        attached,
        tiny_tokenizer,
        uneven,
        num_documents=wanted,
        prompt_formats=False,
        on_step=lambda done, total: steps.append((done, total)),
    )
    expected = count_usage(attached, tiny_tokenizer, uneven[:wanted], prompt_formats=False)
    assert same_usage(usage, expected)
    assert usage.num_documents == min(wanted, len(uneven))
    # Those that give the axes are run once more.
    assert (usage.num_documents, wanted + NUM_DOCUMENTS) in steps
    assert steps[-1] == (2 * usage.num_documents, wanted + NUM_DOCUMENTS)


def test_documents_are_cut_at_max_length(attached, tiny_tokenizer, texts):
    usage = count_usage(attached, tiny_tokenizer, texts[:9], max_length=5, prompt_formats=False)
    assert usage.num_tokens == 9 * 5


def test_prompt_formats_make_the_tokens_of_the_template_frequent(attached, tiny_tokenizer, texts):
    texts = texts[:12]
    plain = count_usage(attached, tiny_tokenizer, texts, prompt_formats=False)
    mixed = count_usage(attached, tiny_tokenizer, texts)
    template = set(tiny_tokenizer("Question: Which planet?\nAnswer:")["input_ids"])
    chat = tiny_tokenizer.convert_tokens_to_ids(["<user>", "<assistant>"])
    assert (plain.token_document_frequency[list(template)] == 0).any()
    assert (mixed.token_document_frequency[list(template)] >= 4).all()
    assert plain.token_document_frequency[chat].tolist() == [0, 0]
    assert mixed.token_document_frequency[chat].tolist() == [4, 4]
    assert mixed.num_documents == plain.num_documents == 12


def test_counting_changes_nothing_of_the_model(attached, tiny_tokenizer, uneven):
    before = {name: value.clone() for name, value in attached.state_dict().items()}
    first = count_usage(attached, tiny_tokenizer, uneven)
    assert same_usage(count_usage(attached, tiny_tokenizer, uneven), first)
    assert all(torch.equal(value, before[name]) for name, value in attached.state_dict().items())
    assert all(layer.before_read is None for layer in memory_layers(attached))


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_a_background_without_text_is_a_data_error(attached, tiny_tokenizer, texts):
    with pytest.raises(DataError, match="no text"):
        count_usage(attached, tiny_tokenizer, texts, prompt_formats=False)


def test_a_model_without_memory_is_an_error(tiny_model, tiny_tokenizer, texts):
    with pytest.raises(NotAttachedError):
        count_usage(tiny_model, tiny_tokenizer, texts)


def test_take_restricts_the_counts_and_keeps_the_totals(attached, tiny_tokenizer, uneven):
    whole = count_usage(attached, tiny_tokenizer, uneven, prompt_formats=False).pools["layer_1"]
    some = whole.take(torch.tensor([40, 3]))
    assert torch.equal(some.reads, whole.reads[[40, 3]])
    assert torch.equal(some.document_frequency, whole.document_frequency[[40, 3]])
    assert dataclasses.astuple(some)[2:] == dataclasses.astuple(whole)[2:]


@pytest.mark.parametrize("method", ["random", "k_means", "context_invariant"])
def test_usage_does_not_fit_keys_that_were_fitted_again(attached, tiny_tokenizer, texts, method):
    fit_keys(attached, tiny_tokenizer, texts, seed=1)
    usage = count_usage(attached, tiny_tokenizer, texts[:8])
    usage.check(attached)
    fit_keys(attached, tiny_tokenizer, texts, method, seed=2)
    with pytest.raises(PoolMismatchError, match=r"count_usage\(\.\.\.\) again"):
        usage.check(attached)


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"layers": (2,)}, {"top_k": 5}, {"num_heads": 1}, {"shared_pool": True}]
)
def test_another_memory_has_another_keys_digest(tiny_model, change):
    config = MemoryConfig(**{"layers": (1,), **MEMORY})
    before = keys_digest(attach_memory(tiny_model, config))
    other = attach_memory(detach_memory(tiny_model), dataclasses.replace(config, **change))
    assert keys_digest(other) != before


def test_learning_and_casting_leave_the_keys_digest(attached):
    before = keys_digest(attached)
    pools(attached)["layer_1"].write(torch.arange(SLOTS), torch.randn(SLOTS, 32))
    assert keys_digest(attached) == before
    assert keys_digest(attached.to(torch.bfloat16)) == before


def test_usage_fits_the_memory_after_save_and_load(attached, tiny_tokenizer, texts, tmp_path):
    fit_keys(attached, tiny_tokenizer, texts)
    usage = count_usage(attached, tiny_tokenizer, texts[:8])
    save(attached, tmp_path / "memory")
    save_usage(usage, tmp_path / "memory" / "background_usage.safetensors")
    loaded, _ = load(tmp_path / "memory", detach_memory(attached))
    load_usage(tmp_path / "memory" / "background_usage.safetensors").check(loaded)


@pytest.fixture
def usage_file(tiny_model, tiny_tokenizer, uneven, tmp_path):
    model = attach_memory(tiny_model, MemoryConfig(layers=(0, 2), **MEMORY))
    usage = count_usage(model, tiny_tokenizer, uneven)
    save_usage(usage, tmp_path / "usage.safetensors")
    return usage, tmp_path / "usage.safetensors"


def test_save_then_load_is_the_same_usage(usage_file):
    usage, path = usage_file
    assert same_usage(load_usage(path), usage)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def resave(path, drop=(), **changes):
    tensors = {name: value for name, value in load_file(path).items() if name not in drop}
    header = {"format": "sparsemem-usage", "format_version": "1", "num_documents": "11"}
    header |= {"num_tokens": "99", "keys_digest": "0", **changes}
    save_file(tensors, path, metadata={key: value for key, value in header.items() if key not in drop})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-50]), "damaged or truncated"),
        (lambda path: path.write_bytes(b""), "damaged or truncated"),
        (lambda path: resave(path, format="sparsemem-delta"), "not a sparsemem-usage file"),
        (lambda path: resave(path, format_version=str(FORMAT_VERSION + 1)), "upgrade sparsemem"),
        (lambda path: resave(path, num_documents="some"), "some"),
        (lambda path: resave(path, drop=("keys_digest",)), "keys_digest"),
        (lambda path: resave(path, drop=("num_tokens",)), "num_tokens"),
        (lambda path: resave(path, drop=("token_document_frequency",)), "token_document_frequency"),
        (lambda path: resave(path, drop=("document_frequency.layer_2",)), "document_frequency"),
    ],
    ids=["cut", "empty", "foreign", "newer", "count", "no digest", "no count", "no tokens", "no frequency"],
)
def test_a_damaged_file_is_an_error(usage_file, damage, message):
    _, path = usage_file
    damage(path)
    with pytest.raises(CheckpointError, match=message):
        load_usage(path)


def test_a_file_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(MissingFileError, match="does not exist"):
        load_usage(tmp_path / "usage.safetensors")


def test_a_full_disk_leaves_nothing_behind(usage_file, monkeypatch):
    usage, path = usage_file

    def full_disk(tensors, path, metadata):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sparsemem.files, "save_file", full_disk)
    with pytest.raises(OutputError, match="No space left on device"):
        save_usage(usage, path.with_name("other.safetensors"))
    assert [file.name for file in path.parent.iterdir()] == [path.name]
