"""Tensors kept for later steps: in memory up to a budget, in mapped files beyond it."""

import os
import shutil
import tempfile
from collections.abc import Sequence

import torch
from torch import Tensor

SEGMENT = 64 * 1024**2
"""Bytes of one file."""
ALIGNMENT = 64


class Shelf:
    """Keeps copies of tensors.

    Files lie in the folder for temporary ones (TMPDIR) and have no name there: whatever ends the process,
    their space is free again. They never take more than half of what was free.

    Args:
        max_bytes: Budget of memory; with 0 nothing is kept at all.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.num_bytes_on_disk = 0
        self.is_full = max_bytes == 0
        """Whether there was no room for something."""
        self._max_bytes_on_disk = shutil.disk_usage(tempfile.gettempdir()).free // 2 if max_bytes else 0
        self._segment = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def put(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
        """Copy tensors that belong together; None if there is no room for all of them.

        What is copied to a file is on the CPU from then on.
        """
        size = sum(tensor.nbytes for tensor in tensors)
        if self.num_bytes + size <= self.max_bytes:
            self.num_bytes += size
            return tuple(tensor.detach().clone() for tensor in tensors)
        sizes = [-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors]
        if not self._has_room(sum(sizes)):
            self.is_full = True
            return None
        return tuple(self._copied(tensor, size) for tensor, size in zip(tensors, sizes, strict=True))

    def _has_room(self, size: int) -> bool:
        if self._used + size <= len(self._segment):
            return True
        length = max(SEGMENT, size)
        if self.num_bytes_on_disk + length > self._max_bytes_on_disk:
            return False
        try:
            self._segment, self._used = _mapped(length), 0
        except OSError:  # the disk is full
            self._max_bytes_on_disk = 0
            return False
        self.num_bytes_on_disk += length
        return True

    def _copied(self, tensor: Tensor, size: int) -> Tensor:
        place = self._segment[self._used :][: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        self._used += size
        return place.copy_(tensor.detach())


def _mapped(size: int) -> Tensor:
    """Map a new file without a name; raises OSError where the disk has no room for it."""
    with tempfile.NamedTemporaryFile(prefix="sparsemem-") as file:
        # A hole in a file that the disk has no room for later would end the process without a word.
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.write(bytes(size))
            file.flush()
        return torch.from_file(file.name, shared=True, size=size, dtype=torch.uint8)
