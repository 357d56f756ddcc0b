"""AdamW scales the steps of a memory along the axes that its usage names, unless it is told not to."""

import copy
import dataclasses

import pytest
import torch

from sparsemem.config import FinetuneConfig
from sparsemem.errors import ConfigError
from sparsemem.training.finetune import finetune


@pytest.fixture
def learned(attached, tiny_tokenizer, facts, config):
    def learned(usage, adam_axes):
        of_run = dataclasses.replace(config, adam_axes=adam_axes)
        delta = finetune(copy.deepcopy(attached), tiny_tokenizer, facts, usage, of_run).delta
        return delta.changes["layer_1"]

    return learned


def test_steps_are_scaled_along_the_axes_of_the_usage(learned, usage):
    along, plain = learned(usage, "fisher"), learned(usage, "rows")
    assert torch.equal(along.slot_ids, plain.slot_ids)
    assert not torch.allclose(along.after, plain.after, atol=1e-2)
    axes = usage.directions["layer_1"]
    of_itself = dataclasses.replace(usage, directions={"layer_1": torch.eye(len(axes))})
    torch.testing.assert_close(learned(of_itself, "fisher").after, plain.after)


def test_usage_that_names_none_leaves_rows_as_they_are(learned, usage):
    older = dataclasses.replace(usage, directions={})
    assert torch.equal(learned(older, "fisher").after, learned(usage, "rows").after)


def test_other_axes_are_refused():
    with pytest.raises(ConfigError, match="adam_axes='hessian'"):
        FinetuneConfig(adam_axes="hessian")
