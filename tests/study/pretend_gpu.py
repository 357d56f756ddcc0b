"""A GPU that is not there: real tensors on the CPU, of which some are said to lie on "cuda:0".

`PretendGpu` refuses what CUDA refuses, as far as it is called from Python: operations on tensors of two
devices, an index on the GPU into a tensor on the CPU, `numpy()` of a tensor on the GPU, a generator of
another device. Tensors without data ("meta") stay what they are, as transformers asks where it loads to.
What becomes of a tensor inside of C++ (in a backward pass, say) is not seen, and fits everywhere.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

GPU, CPU, META = torch.device("cuda", 0), torch.device("cpu"), torch.device("meta")

INDEXED = {"__getitem__", "__setitem__", "index_put_", "index_put"}


def place(tensor: Tensor) -> torch.device | None:
    """Where a tensor is said to lie; None where nobody knows."""
    return tensor.__dict__.get("pretended")


def said_to_lie(found: Any, device: torch.device | None) -> Any:
    """Say so of all tensors in what a function returned."""
    for tensor in tensors_in(found):
        tensor.__dict__["pretended"] = device
    return found


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in arguments or results; much quicker than torch's pytrees."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)
    elif isinstance(value, dict):
        yield from tensors_in([*value.values()])


class PretendGpu(TorchFunctionMode):
    """Within this mode there is one GPU.

    Attributes:
        num_moved: How many tensors were brought to it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_moved = 0
        self.hidden = nn.Parameter.__new__, torch.frombuffer

    def __enter__(self) -> "PretendGpu":
        # What no mode gets to see: where these two put a tensor.
        new, read = self.hidden

        def new_parameter(cls: Any, data: Any = None, requires_grad: bool = True) -> Any:
            return said_to_lie(new(cls, data, requires_grad), CPU if data is None else place(data))

        nn.Parameter.__new__ = staticmethod(new_parameter)
        torch.frombuffer = lambda *args, **options: said_to_lie(read(*args, **options), CPU)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        nn.Parameter.__new__, torch.frombuffer = self.hidden

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        owner = getattr(getattr(func, "__self__", None), "__name__", "")
        if name in ("_parse_to", "_has_compatible_shallow_copy_type"):  # which Module.to asks
            return func(*args, **kwargs)
        if name in ("__get__", "__set__"):
            return self._property(func, owner, args)
        wanted, args, kwargs = _without_devices(args, kwargs)
        tensors = [*tensors_in((args, kwargs))]
        places = {place(t) for t in tensors}
        if name in ("numpy", "__array__") and GPU in places:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        generator = kwargs.get("generator")
        found = func(*args, **kwargs)
        if name == "to" and len(args) > 1 and isinstance(args[1], Tensor):
            wanted = place(args[1])
            return self._moved(found, args[0], wanted)
        if name in ("to", "cuda", "cpu"):
            target = {"cuda": GPU, "cpu": CPU}.get(name, wanted or place(args[0]))
            return self._moved(found, args[0], target)
        if name == "copy_":
            return args[0]
        if wanted is None and not tensors:
            wanted = CPU
        if wanted is None:
            _check(name, args, tensors)
            known = places - {None}
            large = {place(t) for t in tensors if t.dim()} - {None}
            wanted = None if None in places else (large or known).pop()
            if name in INDEXED and args and isinstance(args[0], Tensor):
                wanted = place(args[0])
        if generator is not None and wanted is not None and generator.device.type != wanted.type:
            raise RuntimeError(f"Expected a '{wanted.type}' device type for generator but found 'cpu'")
        inplace = name.endswith("_") and not name.endswith("__") and args and found is args[0]
        return found if inplace else said_to_lie(found, wanted)

    def _moved(self, found: Tensor, before: Tensor, target: torch.device | None) -> Tensor:
        if place(before) != target:
            self.num_moved += target == GPU
            if found is before:
                found = before.view_as(before) if before.requires_grad else before.detach().clone()
        return said_to_lie(found, target)

    def _property(self, func: Any, owner: str, args: Any) -> Any:
        tensor = args[0]
        if owner == "device":
            return place(tensor) or GPU  # what nobody knows comes from the backward pass of a model on it
        if owner == "is_cuda":
            return place(tensor) == GPU
        found = func(*args)
        if owner == "data" and len(args) > 1 and func.__name__ == "__set__":
            tensor.__dict__["pretended"] = place(args[1])
            return found
        if isinstance(found, Tensor) and found is not tensor:
            said_to_lie(found, place(tensor))
        return found


def _without_devices(args: Any, kwargs: dict[str, Any]) -> tuple[torch.device | None, Any, dict[str, Any]]:
    """Take devices out of the arguments, as the work is done on the CPU; return the one asked for."""
    wanted = None
    if kwargs.get("device") is not None:
        wanted = _normal(kwargs["device"])
        kwargs["device"] = META if wanted == META else CPU
    kept = []
    for number, value in enumerate(args):
        if isinstance(value, torch.device) or (
            number and isinstance(value, str) and value.split(":")[0] == "cuda"
        ):
            wanted = _normal(value)
            value = META if wanted == META else CPU
        kept.append(value)
    return wanted, tuple(kept), kwargs


def _normal(device: Any) -> torch.device:
    return {"cuda": GPU, "meta": META}.get(torch.device(device).type, CPU)


def _check(name: str, args: Any, tensors: list[Tensor]) -> None:
    if name in INDEXED:
        target, indices = args[0], [*tensors_in(args[1])]
        if place(target) == CPU and any(place(t) == GPU and t.dim() for t in indices):
            raise RuntimeError(f"{name}: indices should be either on cpu or on the same device as the tensor")
        values = [t for t in args[2:] if isinstance(t, Tensor) and t.dim()]
        tensors = [target, *values]
    # A number on the CPU goes with tensors anywhere, but is not put together with them.
    found = {place(t) for t in tensors if t.dim() or name in ("cat", "stack", "concat")} - {None}
    if len(found) > 1 or (found == {CPU} and any(place(t) == GPU for t in tensors)):
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, found cuda:0 and cpu")
