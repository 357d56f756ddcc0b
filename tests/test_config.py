import dataclasses
import json

import pytest

from sparsemem.config import (
    DEFAULT_LEARNING_RATES,
    PEFT_LEARNING_RATE,
    FinetuneConfig,
    LoadConfig,
    MemoryConfig,
    applicable,
    field_docs,
    from_json,
    to_json,
)
from sparsemem.errors import ConfigError

CONFIGS = (MemoryConfig, FinetuneConfig, LoadConfig)


@pytest.mark.parametrize(
    ("cls", "name", "right"),
    [
        (MemoryConfig, "placement", "replace"),
        (FinetuneConfig, "ranking", "kl"),
        (FinetuneConfig, "anchor", "subject"),
        (FinetuneConfig, "optimizer", "sgd"),
        (FinetuneConfig, "loss_on", "answer"),
    ],
)
def test_an_unknown_choice_is_named_with_the_known_ones(cls, name, right):
    with pytest.raises(ConfigError, match=f"{name}='nonsense'.*{right}"):
        cls(**{name: "nonsense"})


@pytest.mark.parametrize(
    ("cls", "name"),
    [
        (MemoryConfig, "num_keys"),
        (MemoryConfig, "num_heads"),
        (MemoryConfig, "top_k"),
        (MemoryConfig, "query_dim"),
        (FinetuneConfig, "top_t"),
        (FinetuneConfig, "num_epochs"),
        (FinetuneConfig, "facts_per_batch"),
        (FinetuneConfig, "gradient_accumulation_steps"),
        (FinetuneConfig, "num_contexts"),
        (FinetuneConfig, "max_length"),
        (FinetuneConfig, "learning_rate"),
        (FinetuneConfig, "max_document_frequency"),
    ],
)
@pytest.mark.parametrize("value", [0, -3])
def test_a_number_that_is_not_positive_is_named_with_a_remedy(cls, name, value):
    with pytest.raises(ConfigError, match=rf"{name}={value}\b.*; use "):
        cls(**{name: value})


def test_a_learning_rate_is_a_number():
    with pytest.raises(ConfigError, match="learning_rate=nan"):
        FinetuneConfig(learning_rate=float("nan"))


@pytest.mark.parametrize("layers", [(), (3, 3), (1, 2, 1)])
def test_layers_name_each_block_once(layers):
    with pytest.raises(ConfigError, match="layers="):
        MemoryConfig(layers=layers)


def test_top_k_cannot_exceed_the_slots():
    MemoryConfig(num_keys=2, top_k=4)
    with pytest.raises(ConfigError, match="top_k=5 exceeds the 4 slots; lower it"):
        MemoryConfig(num_keys=2, top_k=5)


@pytest.mark.parametrize("quorum", [-0.1, 1.5, float("nan")])
def test_a_quorum_is_a_share(quorum):
    with pytest.raises(ConfigError, match=f"quorum={quorum} is not a share"):
        MemoryConfig(quorum=quorum)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_what_is_averaged_is_a_share_of_the_steps(value):
    with pytest.raises(ConfigError, match=f"average_from={value} is not a share"):
        FinetuneConfig(average_from=value)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_rows_cannot_end_before_they_began(value):
    with pytest.raises(ConfigError, match=f"extrapolate={value} is not positive"):
        FinetuneConfig(extrapolate=value)


def test_a_config_error_is_a_value_error():
    with pytest.raises(ValueError, match="top_t"):
        FinetuneConfig(top_t=0)


@pytest.mark.parametrize("cls", CONFIGS)
def test_every_field_has_a_text(cls):
    docs = field_docs(cls)
    assert list(docs) == [field.name for field in dataclasses.fields(cls)]
    assert all(len(text) > 10 and "\n" not in text for text in docs.values())


@pytest.mark.parametrize(
    "config",
    [
        MemoryConfig(),
        MemoryConfig(
            layers=(2, 5), placement="replace", value_dim=8, shared_pool=True, blocks="model.layers"
        ),
        FinetuneConfig(),
        FinetuneConfig(method="lora", peft={"r": 4}, learning_rate=1e-3, ranking="kl", top_t=3),
    ],
)
def test_a_config_survives_json(config):
    text = json.dumps(to_json(config))
    assert from_json(type(config), json.loads(text), "file.json") == config


@pytest.mark.parametrize("cls", CONFIGS)
def test_an_unknown_option_is_named_with_its_file_and_the_known_ones(cls):
    known = dataclasses.fields(cls)[0].name
    with pytest.raises(ConfigError, match=rf"some/file\.json.*'nonsense'.*{known}"):
        from_json(cls, {"nonsense": 1}, "some/file.json")


def test_the_learning_rate_follows_the_method():
    assert FinetuneConfig().lr == DEFAULT_LEARNING_RATES["memory"]
    assert FinetuneConfig(method="full").lr == DEFAULT_LEARNING_RATES["full"]
    assert FinetuneConfig(method="lora").lr == FinetuneConfig(method="ia3").lr == PEFT_LEARNING_RATE
    assert FinetuneConfig(method="lora", learning_rate=0.5).lr == 0.5


def test_what_depends_on_the_method_can_be_set():
    assert FinetuneConfig().betas == (0.5, 0.999)
    assert FinetuneConfig(method="full").betas == FinetuneConfig(method="lora").betas == (0.9, 0.999)
    assert FinetuneConfig(adam_beta1=0.0).betas == (0.0, 0.999)
    assert FinetuneConfig().strength == FinetuneConfig(method="full", penalty="local_kl").strength == 0.3
    assert FinetuneConfig(method="full", penalty="kl").strength == 1.0
    assert FinetuneConfig(penalty_weight=0.0).strength == 0.0


def test_a_run_from_before_there_was_a_mean_had_none():
    ending = {"average_from", "extrapolate"}
    assert [applicable({"method": "memory"})[name] for name in sorted(ending)] == [1.0, 1.0]
    assert [applicable(to_json(FinetuneConfig()))[name] for name in sorted(ending)] == [0.5, 1.2]
    assert not ending & applicable({"method": "memory", "tie_rows": False}).keys()
    assert not ending & applicable({"method": "lora"}).keys()


def test_what_an_older_run_wrote_down_of_another_method_does_not_count():
    older = {"method": "full", "top_t": 128, "penalty": "none", "penalty_weight": 1.0, "model": "m"}
    assert applicable(older) == applicable({"method": "full", "model": "m"})
    assert applicable(older) != applicable({**older, "num_epochs": 3})
    assert applicable({"method": "memory", "top_t": 128}) != applicable({"method": "memory"})
    assert applicable({"optimizer": "sgd", "momentum": 0.9}) != applicable({"optimizer": "sgd"})


def test_the_text_of_the_learning_rate_names_the_defaults():
    text = field_docs(FinetuneConfig)["learning_rate"]
    numbers = {float(number.rstrip(",.")) for number in text.split() if number[0].isdigit()}
    assert numbers == {*DEFAULT_LEARNING_RATES.values(), PEFT_LEARNING_RATE}
