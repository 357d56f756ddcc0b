import pytest
import torch

from sparsemem.memory.attach import memory_layers
from sparsemem.training.precision import MixedPrecision


def test_frozen_weights_are_bfloat16_within_a_step_and_exact_after_it(attached):
    attached.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in attached.named_parameters()}
    precision = MixedPrecision(attached, "bf16")
    with precision.step():
        dtypes = {name: p.dtype for name, p in attached.named_parameters()}
    assert dtypes["model.layers.0.mlp.up_proj.weight"] == torch.bfloat16
    assert dtypes["model.embed_tokens.weight"] == torch.float32
    memory = [name for name in dtypes if ".memory." in name]
    assert memory
    assert all(dtypes[name] == torch.float32 for name in memory)
    for name, p in attached.named_parameters():
        assert p.dtype == torch.float32
        assert torch.equal(p, before[name])


def test_weights_are_exact_again_after_an_error(attached):
    attached.requires_grad_(False)
    with pytest.raises(RuntimeError, match="inside"), MixedPrecision(attached, "bf16").step():
        raise RuntimeError("inside")
    assert {p.dtype for p in attached.parameters()} == {torch.float32}


def test_what_is_trained_is_left_alone(tiny_model):
    precision = MixedPrecision(tiny_model, "bf16")
    assert precision.frozen == []
    assert precision.head is None


def test_a_head_that_shares_the_embedding_is_bfloat16_alone(tiny_model):
    tiny_model.requires_grad_(False)
    embedding = tiny_model.get_input_embeddings()
    tiny_model.lm_head.weight = embedding.weight
    with MixedPrecision(tiny_model, "bf16").step():
        assert tiny_model.lm_head.weight.dtype == torch.bfloat16
        assert torch.equal(tiny_model.lm_head.weight, embedding.weight.bfloat16())
        assert embedding.weight.dtype == torch.float32
    assert tiny_model.lm_head.weight is embedding.weight
    assert "lm_head.weight" not in dict(tiny_model.named_parameters()), "else it is two weights from now on"


def test_no_mixed_precision_changes_nothing(attached):
    attached.requires_grad_(False)
    precision = MixedPrecision(attached, "no")
    with precision.step(), precision.forward(9):
        assert not torch.is_autocast_enabled("cpu")
        assert {p.dtype for p in attached.parameters()} == {torch.float32}
    assert next(memory_layers(attached)).keys.dtype == torch.float32


def test_a_pass_computes_what_autocast_alone_computes(attached):
    attached.requires_grad_(False)
    input_ids = torch.randint(0, attached.config.vocab_size, (2, 9))
    precision = MixedPrecision(attached, "bf16")
    with torch.no_grad():
        with precision.forward(9):
            plain = attached(input_ids).logits
        with precision.step(), precision.forward(9):
            kept = attached(input_ids).logits
    assert torch.equal(plain, kept)


@pytest.mark.parametrize(
    ("mode", "is_quick", "is_said"), [("bf16", False, 1), ("bf16", True, 0), ("no", False, 0)]
)
def test_a_cpu_that_imitates_bfloat16_is_said_to(tiny_model, monkeypatch, recwarn, mode, is_quick, is_said):
    monkeypatch.setattr("sparsemem.training.precision.computes_in_bf16", lambda: is_quick)
    MixedPrecision(tiny_model, mode)
    assert ["mixed_precision='no'" in str(warning.message) for warning in recwarn] == [True] * is_said
