"""The Triton kernels in Triton's interpreter, which runs them on a CPU; on a GPU they have not been run."""

import pytest
import torch

from sparsemem.memory import read as read_module
from sparsemem.memory.read import PlainRead, fused_read, is_same_read

CPU = torch.device("cpu")


@pytest.fixture
def fused():
    pytest.importorskip("triton")
    from sparsemem.memory.fused_read import FusedRead

    return FusedRead


@pytest.fixture
def on_cpu(monkeypatch, fused):
    """What is done on CUDA is done here."""
    cuda = type("Device", (), {"type": "cuda", "__str__": lambda _: "cuda:0"})()
    monkeypatch.setattr(read_module, "is_same_read", lambda cls, _: is_same_read(cls, CPU))
    fused_read.cache_clear()
    yield cuda
    fused_read.cache_clear()


def sums_and_gradients(read, weights, table, row_ids):
    inputs = weights.clone().requires_grad_(), table.clone().requires_grad_()
    sums = read.apply(*inputs, row_ids)
    grad = torch.arange(sums.numel(), dtype=torch.float32).view_as(sums) % 7 - 3
    return sums.detach(), *torch.autograd.grad(sums, inputs, grad)


@pytest.mark.parametrize(
    ("tokens", "reads", "rows", "width", "least"),
    [(7, 20, 5, 130, -3), (1, 1, 1, 1, 0), (3, 40, 2, 256, -1), (5, 17, 300, 3, -200), (4, 16, 9, 64, 0)],
)
def test_the_kernels_find_what_the_plain_read_does(fused, tokens, reads, rows, width, least):
    torch.manual_seed(0)
    inputs = torch.rand(tokens, reads), torch.randn(rows, width), torch.randint(least, rows, (tokens, reads))
    found = sums_and_gradients(fused, *inputs)
    torch.testing.assert_close(found, sums_and_gradients(PlainRead, *inputs), rtol=1e-5, atol=1e-5)
    again = sums_and_gradients(fused, *inputs)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


def test_where_nothing_is_hit_all_is_exactly_zero(fused):
    found = sums_and_gradients(fused, torch.rand(3, 5), torch.randn(2, 4), torch.full((3, 5), -1))
    assert not any(tensor.any() for tensor in found)


@pytest.mark.parametrize(("tokens", "rows"), [(0, 2), (2, 0)])
def test_no_tokens_and_no_rows_are_none(fused, tokens, rows):
    found = sums_and_gradients(
        fused, torch.rand(tokens, 5), torch.randn(rows, 4), torch.full((tokens, 5), -1)
    )
    assert [tuple(tensor.shape) for tensor in found] == [(tokens, 4), (tokens, 5), (rows, 4)]


def test_a_read_is_taken_only_where_it_gives_the_same(on_cpu, fused, monkeypatch, recwarn):
    assert fused_read(on_cpu) is fused
    assert not recwarn
    fused_read.cache_clear()
    forward = fused.forward
    monkeypatch.setattr(fused, "forward", staticmethod(lambda *args: 2 * forward(*args)))
    with pytest.warns(UserWarning, match="without Triton on cuda:0, which is slower: it gives other numbers"):
        assert fused_read(on_cpu) is None


def test_a_kernel_that_does_not_compile_is_said_and_done_without(on_cpu, fused, monkeypatch):
    def fails(*_):
        raise RuntimeError("no such device")

    monkeypatch.setattr(fused, "forward", staticmethod(fails))
    with pytest.warns(UserWarning, match="no such device"):
        assert fused_read(on_cpu) is None


def test_a_cpu_has_none():
    assert fused_read(CPU) is None


def test_the_first_read_may_be_one_without_gradients():
    with torch.inference_mode():
        assert is_same_read(PlainRead, CPU)
