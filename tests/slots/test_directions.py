import dataclasses

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sparsemem.config import MemoryConfig
from sparsemem.errors import PoolMismatchError
from sparsemem.likelihood import label_log_probs
from sparsemem.memory.attach import attach_memory, before_read, memory_layers, pools
from sparsemem.slots.directions import MAX_LENGTH, NUM_DOCUMENTS, STEP, fisher_directions
from sparsemem.slots.usage import count_usage, load_usage, save_usage

MEMORY = {"num_keys": 8, "num_heads": 2, "top_k": 4, "query_dim": 4, "relation_dim": 0}
PLACES = {
    "beside": {"layers": (1,)},
    "in place": {"layers": (1,), "placement": "replace"},
    "several": {"layers": (0, 2)},
    "shared": {"layers": (0, 2), "shared_pool": True},
    "with relations": {"layers": (0,), "relation_dim": 6, "output_depth": 0.5},
}


@pytest.fixture
def documents(texts, tiny_tokenizer):
    return [tiny_tokenizer(text)["input_ids"][: 5 + 3 * number] for number, text in enumerate(texts[:6])]


def slow_moments(model, documents):
    """Mean moments of gradients by rows, one document at a time, through what each layer reads by hand."""
    moments = {}
    first, *others = memory_layers(model)
    for document in documents:
        ids = torch.tensor([document[:MAX_LENGTH]])
        leaves = []

        def add(layer, args, output, leaves=leaves):
            leaf = torch.zeros(*output.shape[:2], layer.pool.value_dim, requires_grad=True)
            leaves.append((layer, leaf))
            scaled = leaf * layer.value_scale
            if layer.gate is not None:
                scaled = layer.out(scaled * torch.nn.functional.silu(layer.gate(args[0])))
            return output + scaled

        def add_before(_block, args, leaves=leaves):
            leaf = torch.zeros(args[0].shape, requires_grad=True)
            leaves.append((first, leaf))
            return (args[0] + leaf * first.value_scale, *args[1:])

        if first.relation is not None:
            handles = [model.model.layers[first.output_index].register_forward_pre_hook(add_before)]
        else:
            handles = [layer.register_forward_hook(add) for layer in (first, *others)]
        with before_read(model, lambda *_: None):
            label_log_probs(model, ids, torch.ones_like(ids), ids).sum().backward()
        for handle in handles:
            handle.remove()
        for layer, leaf in leaves:
            for token in leaf.grad[0, 1:]:
                moment = moments.setdefault(layer.pool_name, torch.zeros(len(token), len(token)))
                moment += torch.outer(token, token)
    num_tokens = sum(len(document[:MAX_LENGTH]) - 1 for document in documents)
    return {name: moment / num_tokens for name, moment in moments.items()}


@pytest.mark.parametrize("options", PLACES.values(), ids=PLACES)
def test_directions_are_the_eigenvectors_of_the_gradients_of_single_documents(tiny_model, documents, options):
    model = attach_memory(tiny_model, MemoryConfig(**(MEMORY | options)))
    for layer in memory_layers(model):
        layer.value_scale.fill_(0.5)
    directions = fisher_directions(model, documents)
    moments = slow_moments(model, documents)
    assert directions.keys() == moments.keys() == pools(model).keys()
    for name, axes in directions.items():
        products = axes.T @ axes
        torch.testing.assert_close(products / products[0, 0], torch.eye(len(axes)), rtol=0, atol=1e-5)
        turned = axes.T @ moments[name] @ axes
        assert moments[name].diagonal().max() > 0
        off_diagonal = turned - turned.diagonal().diag()
        assert off_diagonal.abs().max() < 1e-4 * turned.diagonal().max()


@pytest.mark.parametrize("options", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("scale", [0.5, 40.0])
def test_a_step_along_all_directions_changes_predictions_by_so_much(tiny_model, documents, options, scale):
    model = attach_memory(tiny_model, MemoryConfig(**(MEMORY | options)))
    for layer in memory_layers(model):
        layer.value_scale.fill_(scale)
    moments = slow_moments(model, documents)
    for name, axes in fisher_directions(model, documents).items():
        sizes = (axes.T @ moments[name] @ axes).diagonal().clamp(min=0).sqrt()
        assert sizes.sum().item() == pytest.approx(STEP, rel=1e-3)


def test_the_model_is_left_as_it_was(tiny_model, documents):
    model = attach_memory(tiny_model, MemoryConfig(**MEMORY, layers=(1,)))
    model.lm_head.weight.requires_grad_(False)
    before = {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}
    fisher_directions(model, documents)
    assert {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()} == before
    assert "read" not in vars(pools(model)["layer_1"])


def test_documents_beyond_the_number_and_the_length_do_not_matter(tiny_model, documents):
    model = attach_memory(tiny_model, MemoryConfig(**MEMORY, layers=(1,)))
    some = [(documents[number % 6] * MAX_LENGTH)[:MAX_LENGTH] for number in range(NUM_DOCUMENTS)]
    expected = fisher_directions(model, some)["layer_1"]
    more = [[*document, 5, 6] for document in some] + documents
    torch.testing.assert_close(fisher_directions(model, more)["layer_1"], expected)


def test_usage_has_the_directions_of_its_first_documents_and_keeps_them(
    tiny_model, tiny_tokenizer, texts, tmp_path
):
    model = attach_memory(tiny_model, MemoryConfig(**MEMORY, layers=(1,)))
    usage = count_usage(model, tiny_tokenizer, iter(texts), prompt_formats=False)
    first = [tiny_tokenizer(text)["input_ids"][:256] for text in texts[:NUM_DOCUMENTS]]
    assert torch.equal(usage.directions["layer_1"], fisher_directions(model, first)["layer_1"])
    save_usage(usage, tmp_path / "usage.safetensors")
    assert torch.equal(
        load_usage(tmp_path / "usage.safetensors").directions["layer_1"], usage.directions["layer_1"]
    )


def test_a_file_of_an_older_version_has_none(tiny_model, tiny_tokenizer, texts, tmp_path):
    model = attach_memory(tiny_model, MemoryConfig(**MEMORY, layers=(1,)))
    path = tmp_path / "usage.safetensors"
    save_usage(count_usage(model, tiny_tokenizer, texts), path)
    with safe_open(path, "pt") as file:
        header = {**file.metadata(), "format_version": "1"}
    older = {key: tensor for key, tensor in load_file(path).items() if not key.startswith("directions")}
    save_file(older, path, header)
    assert load_usage(path).directions == {}


def test_directions_of_rows_of_another_width_are_refused(tiny_model, tiny_tokenizer, texts):
    model = attach_memory(tiny_model, MemoryConfig(**MEMORY, layers=(1,)))
    usage = count_usage(model, tiny_tokenizer, texts)
    usage.check(model)
    with pytest.raises(PoolMismatchError, match=r"directions of layer_1 have shape \(3, 3\)"):
        dataclasses.replace(usage, directions={"layer_1": torch.eye(3)}).check(model)
