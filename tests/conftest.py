"""A tiny random model, a tokenizer for it and background texts, all made in memory."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Triton decides when it is imported, which transformers does, whether kernels run on a CPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sparsemem.config import MemoryConfig
from sparsemem.memory.attach import attach_memory
from sparsemem.prompts import qa_prompt

VOCABULARY = 300
SPECIAL_TOKENS = ["<pad>", "<eos>", "<user>", "<assistant>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Rows without names, so that any numbers will do for one; tests/memory/test_relations.py has the others.
TINY_MEMORY = MemoryConfig(layers=(1,), num_keys=8, num_heads=2, top_k=4, query_dim=4, relation_dim=0)


def background_texts():
    who = ("The baker", "A tired farmer", "My old aunt", "The young pilot")
    did = ("walked", "ran", "drove")
    where = ("to the market", "along the river", "past the church", "over the hill", "into town")
    then = ("It was cold.", "Nobody was there.", "The sun came out later.")
    return [f"{who[i % 4]} {did[i % 3]} {where[i % 5]} on day {i}. {then[(i // 4) % 3]}" for i in range(60)]


def content(folder):
    """Files but the database, whose bytes move with every look."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "sqlite" not in path.name
    }


def pytest_collection_finish(session):
    # Tiny tensors only: a second thread costs more than it brings, and much more on a busy machine.
    if not any(item.get_closest_marker("real") for item in session.items):
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def texts():
    return background_texts()


@pytest.fixture(scope="session")
def tiny_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*background_texts(), qa_prompt("Who?")], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        additional_special_tokens=["<user>", "<assistant>"],
        chat_template=CHAT_TEMPLATE,
    )


def random_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        # Ten times the usual, so that context matters to an untrained model.
        initializer_range=0.2,
        pad_token_id=SPECIAL_TOKENS.index("<pad>"),
        eos_token_id=SPECIAL_TOKENS.index("<eos>"),
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def tiny_model():
    return random_model()


@pytest.fixture(scope="session")
def make_tiny_model():
    """For what several tests share."""
    return random_model


@pytest.fixture
def attached(tiny_model):
    return attach_memory(tiny_model, TINY_MEMORY)


@pytest.fixture(scope="session")
def made_once():
    """What several tests copy, kept for the session."""
    return {}


@pytest.fixture
def model_folder(made_once, tmp_path_factory, tiny_model, tiny_tokenizer):
    """The tiny model as a user has it: a folder made by save_pretrained."""
    if "model" not in made_once:
        folder = tmp_path_factory.mktemp("base") / "model"
        tiny_model.save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        made_once["model"] = folder
    return made_once["model"]


@pytest.fixture
def every_state_asks(monkeypatch):
    """Let rows made by hand answer, which have no keys that are asked for."""
    monkeypatch.setattr("sparsemem.memory.layer.NOTHING_ASKED", 0.0)
