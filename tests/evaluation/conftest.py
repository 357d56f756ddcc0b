"""A tiny model that has learned something, so that its memory answers too."""

import pytest
import torch

from sparsemem.memory.attach import pools


@pytest.fixture
def taught(attached):
    pool = pools(attached)["layer_1"]
    generator = torch.Generator().manual_seed(2)
    pool.write(torch.arange(0, 64, 2), torch.randn(32, pool.value_dim, generator=generator))
    return attached
