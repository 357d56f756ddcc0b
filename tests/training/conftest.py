"""Facts for the tiny model, its background usage, and ways to look at all of its rows."""

import dataclasses
import errno
import os

import pytest
import torch

from sparsemem.config import FinetuneConfig, MemoryConfig
from sparsemem.data import Fact
from sparsemem.memory.attach import pools
from sparsemem.slots.usage import count_usage
from sparsemem.training.questions import fact_of

# No prompt formats: their five examples are four fifths of the time and change nothing here.
USAGE_OPTIONS = {"num_documents": 30, "prompt_formats": False}

NAMED_MEMORY = MemoryConfig(
    layers=(0,), output_depth=0.5, num_keys=16, num_heads=2, top_k=4, query_dim=4, relation_dim=6
)
OWNER = Fact(question="Who owns Zed?", answer="Ana", subject="Zed")
LONG = dataclasses.replace(OWNER, answer="Ana, Bo, Carl and Dora of the old mill")


def write_rows(naming):
    """Put the rows of a solved naming into the pool, without values."""
    slot_ids, tags = naming.claim({fact: naming._claimed[fact][0] for fact in naming.name_of})
    numbers, row_of = (tags - naming.pool.num_slots).unique(return_inverse=True)
    rows = torch.zeros(len(numbers), naming.pool.value_dim)
    for row, number in zip(rows, numbers.tolist(), strict=True):
        row[0], row[1:7] = naming.name_of[fact_of(number)], naming._keys[number]
    naming.pool.write(slot_ids, rows, row_of)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def falls(result, config):
    """Whether the mean loss of the last pass over the facts is lower than that of the first."""
    steps = len(result.losses) // config.num_epochs
    return sum(result.losses[-steps:]) < sum(result.losses[:steps])


@pytest.fixture
def usage(attached, tiny_tokenizer, texts):
    return count_usage(attached, tiny_tokenizer, texts, **USAGE_OPTIONS)


@pytest.fixture
def facts():
    return [
        Fact(question="Who owns Zed?", answer="Ana", subject="Zed", id="0"),
        Fact(statement="Quz is made of tin.", answer="tin", subject="Quz", id="1"),
        Fact(question="Where is Xix?", answer="in Oslo", paraphrases=("Xix lies in Oslo.",), id="2"),
        Fact(statement="Jov left.", subject="Jov", id="3"),
    ]


@pytest.fixture
def config():
    return FinetuneConfig(
        num_epochs=3, top_t=8, learning_rate=0.05, facts_per_batch=2, wordings_per_step=99, max_length=128
    )


@pytest.fixture
def full_disk(monkeypatch):
    def allocate(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", allocate)


@pytest.fixture
def logits_of(tiny_tokenizer, texts):
    input_ids = torch.tensor([ids[:16] for ids in tiny_tokenizer(texts[:8])["input_ids"]])

    @torch.no_grad()
    def logits_of(model):
        return model(input_ids=input_ids).logits

    return logits_of


@pytest.fixture
def all_rows():
    def all_rows(model):
        return {name: pool.current(torch.arange(pool.num_slots)) for name, pool in pools(model).items()}

    return all_rows
