import dataclasses

import pytest
import torch

from sparsemem.training.finetune import finetune

from .conftest import equal, falls

# PEFT asks transformers for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_baseline_trains_other_weights_than_the_memorys(
    attached, tiny_tokenizer, facts, usage, config, all_rows, method
):
    finetune(attached, tiny_tokenizer, facts[:1], usage, config)
    rows, before = all_rows(attached), weights_of(attached)
    options = {"peft": {"r": 2}} if method == "lora" else {}
    config = dataclasses.replace(config, method=method, learning_rate=0.01, **options)
    result = finetune(attached, tiny_tokenizer, facts, None, config)
    assert result.delta is None
    assert falls(result, config)
    assert equal(all_rows(attached), rows)
    assert not result.model.training
    after = {name.replace(".base_layer", ""): p for name, p in attached.named_parameters()}
    moved = changed(before, after)
    if method == "full":
        assert moved == {name for name in before if ".memory." not in name}
        assert result.num_trained == sum(before[name].numel() for name in moved)
        assert result.model is attached
    else:
        assert moved == set()
        trained = {name for name, p in result.model.named_parameters() if p.requires_grad}
        assert trained
        assert all("lora_" in name and ".memory." not in name for name in trained)
        assert all(p.abs().max() > 0 for name, p in result.model.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_baseline_needs_no_memory(tiny_model, tiny_tokenizer, facts, config, method):
    config = dataclasses.replace(config, method=method, learning_rate=0.01)
    result = finetune(tiny_model, tiny_tokenizer, facts, None, config)
    assert falls(result, config)


def test_a_second_update_of_a_baseline_carries_its_adapter_on(tiny_model, tiny_tokenizer, facts, config):
    lora = dataclasses.replace(config, method="lora", peft={"r": 2}, learning_rate=0.01)
    first = finetune(tiny_model, tiny_tokenizer, facts[:2], None, lora)
    weights = {n: p.clone() for n, p in first.model.named_parameters() if "lora_A" in n}
    second = finetune(first.model, tiny_tokenizer, facts[2:], None, lora)
    assert second.model is first.model
    assert second.num_trained == first.num_trained
    moved = [not torch.equal(weights[n], p) for n, p in second.model.named_parameters() if n in weights]
    assert all(moved)
    assert not any(n.count("lora_A") > 1 for n, _ in second.model.named_parameters())
