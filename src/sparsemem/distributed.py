"""Several processes that learn as one. The only import of torch.distributed.

They are started by torchrun or `accelerate launch`, run the same program on the same data, and take shares of
what costs time; what they find is summed or gathered, so that all go on from the same. In one process
there is nothing to share or to wait for.
"""

import contextlib
import datetime
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from sparsemem.errors import ConfigError, ProcessError, SparsememError

T = TypeVar("T")

TRAFFIC: Counter[str] = Counter()
"""Bytes that this process has put into exchanges so far: "sum" and "gather". With two processes that is what
it sends; a ring of n sends 2 (n - 1) / n times as much of a sum."""

PATIENCE = datetime.timedelta(days=1)
"""How long a process waits for the others, for example while the main one measures."""


def world_size() -> int:
    """Processes that learn together; 1 where nothing was started."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this is the process that measures, prints and writes."""
    return rank() == 0


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Join the processes that a launcher started, and part from them at the end.

    Where one fails the launcher ends all of them. Only the first to fail says why: of a mistake that all
    of them find, one message is enough, and "the connection was closed" is no reason.

    Raises:
        SystemExit: Another process failed before this one.
    """
    backend = "gloo"
    if torch.cuda.is_available():
        number_here, num_gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if number_here >= num_gpus:
            raise ProcessError(
                f"process {number_here} has no GPU of its own: there are {num_gpus}; start one process for "
                "each, or hide them with CUDA_VISIBLE_DEVICES= to run on the CPU"
            )
        torch.cuda.set_device(number_here)
        backend = "cpu:gloo,cuda:nccl"
    store, number, size = next(rendezvous("env://"))
    dist.init_process_group(backend, store=store, rank=number, world_size=size, timeout=PATIENCE)
    try:
        yield
        dist.destroy_process_group()
    except Exception as error:
        if not _is_first_to_fail(store):
            code = error.exit_code if isinstance(error, SparsememError) else 1
            raise SystemExit(code) from error
        raise


def share(items: Sequence[T], first: int = 0) -> list[T]:
    """Take this process's share of some items, which are dealt out in turn.

    Args:
        items: The same in all processes.
        first: The process that gets the first item; counted around.
    """
    return list(items[(rank() - first) % world_size() :: world_size()])


def summed(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes; the same in all of them, bit for bit."""
    if world_size() == 1 or not tensor.numel():
        return tensor
    sent = tensor.detach().to(_wire(tensor)).contiguous().clone()
    TRAFFIC["sum"] += sent.nbytes
    with _others_running():
        dist.all_reduce(sent)
    return sent.to(tensor.device)


def summed_numbers(*numbers: float) -> list[float]:
    """Sum some numbers over all processes."""
    return [*numbers] if world_size() == 1 else summed(torch.tensor(numbers, dtype=torch.float64)).tolist()


def gathered(tensor: Tensor) -> Tensor:
    """Put the rows of all processes behind one another, in the order of ranks.

    Args:
        tensor: Of any number of rows, which may differ from process to process.
    """
    if world_size() == 1:
        return tensor
    sent = tensor.detach().to(_wire(tensor)).contiguous()
    num_rows = torch.zeros(world_size(), dtype=torch.int64)
    num_rows[rank()] = len(sent)
    num_rows = summed(num_rows)
    TRAFFIC["gather"] += sent.nbytes
    # Padded: gloo gathers equal shapes only.
    longest = int(num_rows.max())
    padded = torch.cat([sent, sent.new_zeros(longest - len(sent), *sent.shape[1:])])
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    with _others_running():
        dist.all_gather(parts, padded)
    found = [part[:num] for part, num in zip(parts, num_rows.tolist(), strict=True)]
    return torch.cat(found).to(tensor.device)


def from_main(run: Callable[[], T], model: nn.Module | None = None) -> T:
    """Run something in the main process while the others wait; all get what it returned.

    Args:
        run: What to run.
        model: The model it runs, if any. All processes run one that is spread over them.
    """
    if world_size() == 1:
        return run()
    box = [run() if is_main() or is_spread(model) else None]
    with _others_running():
        dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[return-value]


def main_first(run: Callable[[], T]) -> T:
    """Run something in every process, but not before the main one has: so a cache is filled by one."""
    made = [run()] if is_main() else []
    from_main(lambda: None)
    return made[0] if made else run()


def copy_from_main(tensors: Sequence[Tensor]) -> None:
    """Overwrite tensors, of the same shapes in all processes, with those of the main one."""
    if world_size() == 1:
        return
    for tensor in tensors:
        sent = tensor.detach().to(_wire(tensor)).contiguous()
        with _others_running():
            dist.broadcast(sent, src=0)
        tensor.detach().copy_(sent)


def spread(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    whole: Collection[nn.Parameter],
    device: torch.device,
) -> None:
    """Spread the weights of a model over several processes, frozen (FSDP2).

    Each process keeps a part of every weight, and has those of a block together only while it runs.

    Args:
        model: The model, on the CPU.
        blocks: Modules in it that run one after another.
        whole: Parameters that every process keeps.
        device: Where the parts are put; on CUDA the current device.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    kept = {*whole}
    for parameter in {*model.parameters()} - kept:
        parameter.requires_grad_(False)
    mesh = init_device_mesh(device.type, (world_size(),))
    for module in (*blocks, model):
        # Of the outermost too: by default its weights, the largest matrix among them, stay together.
        fully_shard(module, mesh=mesh, ignored_params=kept, reshard_after_forward=True)


def is_spread(model: nn.Module | None) -> bool:
    """Whether the weights of a model are spread over processes, all of which then have to run it at once."""
    if model is None or world_size() == 1:
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def check_whole(model: nn.Module, purpose: str) -> None:
    """Raise ConfigError if a model is spread over processes."""
    if is_spread(model):
        raise ConfigError(f"{purpose} needs a model that is not spread over processes; do it before")


def in_step(model: nn.Module, parts: Sequence[T], spare: Callable[[], T]) -> Iterator[tuple[T, bool]]:
    """Yield what this process runs of a model; of one that is spread, as much in every process.

    Args:
        model: What is run.
        parts: One forward pass each.
        spare: Makes one that a process runs for the others' sake when it has no more of its own.

    Yields:
        A part, and whether it counts: the spare one does not.
    """
    num_parts = [len(parts)]
    if is_spread(model):
        num_parts = gathered(torch.tensor(num_parts)).tolist()
    yield from ((part, True) for part in parts)
    yield from ((spare(), False) for _ in range(max(num_parts) - len(parts)))


def _wire(tensor: Tensor) -> torch.device:
    """Where a tensor has to be to travel: groups that others started may know GPUs only."""
    only_gpus = "gloo" not in dist.get_backend_config()
    return torch.device("cuda") if only_gpus else tensor.device


@contextlib.contextmanager
def _others_running() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ProcessError(f"another process ended in the middle of the work: {error}") from error


def _is_first_to_fail(store: Any) -> bool:
    try:
        return bool(store.add("sparsemem/failed", 1) == 1)
    except RuntimeError:  # the store is gone, and with it the process that kept it
        return False
