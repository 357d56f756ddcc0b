import pytest
import torch

from sparsemem.errors import MissingFileError
from sparsemem.memory.base_model import fingerprint, load_base_model


def test_loading_gives_the_model_in_evaluation_mode_under_its_name(tiny_model, tiny_tokenizer, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    model, tokenizer = load_base_model(str(tmp_path))
    tokens = torch.randint(4, 300, (2, 9))
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, tiny_model(tokens).logits)
    assert not model.training
    assert model.name_or_path == str(tmp_path)
    assert tokenizer("Who?") == tiny_tokenizer("Who?")


@pytest.mark.parametrize("name", ["no such folder", "no such file.gguf", "empty"])
def test_what_is_no_model_is_an_error_that_names_it(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingFileError, match=name):
        load_base_model(str(tmp_path / name))


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.2.mlp.up_proj.weight"])
def test_fingerprint_changes_with_any_weight_and_not_with_their_order(tiny_model, name):
    weights = list(tiny_model.named_parameters())
    before = fingerprint(weights)
    assert fingerprint(reversed(weights)) == before
    with torch.no_grad():
        dict(weights)[name].mul_(1.1)
    assert fingerprint(weights) != before


def test_fingerprint_is_the_same_in_float32_and_bfloat16(tiny_model):
    before = fingerprint(tiny_model.named_parameters())
    assert fingerprint(tiny_model.to(torch.bfloat16).named_parameters()) == before
