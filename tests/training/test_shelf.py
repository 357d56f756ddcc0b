"""What is put on the shelf comes back bit for bit, from memory or from a file."""

import os
import shutil
import tempfile

import pytest
import torch

from sparsemem.training import shelf as shelf_module
from sparsemem.training.shelf import Shelf


def drawn(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype)


KEPT = [
    (drawn(3, 5), torch.arange(7)),
    (drawn(2, 3, dtype=torch.bfloat16), drawn(0, 4), torch.tensor([True, False, True])),
    (drawn(4, 6).T, drawn(5, 5)[1:, 2:]),
]


@pytest.mark.parametrize("max_bytes", [1, 150, 10_000])
def test_tensors_come_back_as_they_were_and_are_copies(max_bytes):
    shelf = Shelf(max_bytes)
    given = [[tensor.clone() for tensor in tensors] for tensors in KEPT]
    kept = [shelf.put(tensors) for tensors in given]
    for tensors in given:
        for tensor in tensors:
            tensor.zero_()
    for found, expected in zip(kept, KEPT, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        assert [one.dtype for one in found] == [other.dtype for other in expected]


def test_memory_is_used_up_to_the_budget_and_files_beyond_it():
    shelf = Shelf(100)
    for number, expected in enumerate([40, 80, 80, 80]):
        shelf.put([drawn(10)])
        assert shelf.num_bytes == expected
        assert bool(shelf.num_bytes_on_disk) == (number >= 2)


def test_files_are_filled_before_another_is_made(monkeypatch):
    monkeypatch.setattr(shelf_module, "SEGMENT", 256)
    shelf = Shelf(1)
    sizes = []
    for _ in range(5):
        shelf.put([drawn(20), drawn(4)])  # 80 and 16 bytes, in places of 128 and 64
        sizes.append(shelf.num_bytes_on_disk)
    assert sizes == [256, 512, 768, 1024, 1280]
    shelf.put([drawn(8)])
    assert shelf.num_bytes_on_disk == 1280
    (large,) = shelf.put([drawn(1000)])
    assert shelf.num_bytes_on_disk == 1280 + 4032
    assert large.shape == (1000,)


def test_with_no_budget_nothing_is_kept():
    assert Shelf(0).put([drawn(1)]) is None


def test_a_full_disk_ends_it_and_keeps_what_is_there(full_disk):
    shelf = Shelf(100)
    (kept,) = shelf.put([torch.ones(10)])
    assert shelf.put([drawn(100)]) is None
    assert shelf.put([drawn(1)]) is not None  # there is memory for it
    assert shelf.num_bytes_on_disk == 0
    assert kept.sum() == 10


def test_no_more_than_half_of_the_free_disk_is_taken(monkeypatch):
    monkeypatch.setattr(shelf_module, "SEGMENT", 256)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2000, 800, 1200))
    shelf = Shelf(1)
    kept = [shelf.put([drawn(64)]) for _ in range(4)]
    assert [tensors is not None for tensors in kept] == [True, True, False, False]


def test_no_file_is_left_and_graphs_are_not_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    tensor = drawn(5).requires_grad_()
    for shelf in (Shelf(1), Shelf(100)):
        (kept,) = shelf.put([tensor * 2])
        assert not kept.requires_grad
    assert not any(tmp_path.iterdir())


def test_without_fallocate_files_are_written_out(monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    shelf = Shelf(1)
    (kept,) = shelf.put([torch.arange(9)])
    assert torch.equal(kept, torch.arange(9))
