"""A model as one version of a history has it."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsemem.errors import SparsememError
from sparsemem.memory import checkpoint
from sparsemem.memory.attach import detach_memory, pools
from sparsemem.memory.delta import DeltaRecorder
from sparsemem.store.history import DeltaStore
from sparsemem.store.state import State, write


def load(
    path: str | Path,
    base_model: str | Any | None = None,
    *,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str = "cpu",
    revision: str = "HEAD",
) -> tuple[Any, Any]:
    """Rebuild a model with its memory and everything it learned.

    Args:
        path: A folder made by `save` or `sparsemem attach`, or the Hub id of one.
        base_model: Name of the base model, or the loaded model itself (it is changed in place), if
            it is no longer where it was when the memory was saved.
        dtype: Of the base model's weights, where it is loaded here: a torch dtype or its name.
        device: Where it is put then; "auto" is a GPU of CUDA where there is one, else the CPU.
        revision: A version of its history; "attached" is the memory before any update.

    Returns:
        Model in evaluation mode, and tokenizer (None if a loaded model was passed).

    Raises:
        ConfigError: This machine has no such device.
        MissingFileError: The folder or the base model is not there.
        CheckpointError: A file is damaged, foreign or of a newer format.
        HistoryError: There is no such version.
        ModelMismatchError: The base model is another one.
    """
    folder = checkpoint.local_folder(path)
    checkpoint.read_header(folder)
    store = DeltaStore(folder)
    state = store.state(store.resolve(revision))
    model, tokenizer = checkpoint.load(folder, base_model, dtype=dtype, device=device)
    try:
        write(state, pools(model))
    except SparsememError:
        detach_memory(model)
        raise
    return model, tokenizer


@contextlib.contextmanager
def overlaid(model: nn.Module, states: Sequence[State]) -> Iterator[None]:
    """Within this context a model also knows what some other versions do, the last one before the first.

    One base serves many: a company's updates, a user's on top of them. Switching writes rows; the model
    is not loaded again, and afterwards it is bit for bit what it was.

    Args:
        model: A model with the memory these versions were learned on.
        states: What they wrote, from `DeltaStore.state`.

    Raises:
        PoolMismatchError: A version is of another memory.
    """
    targets = pools(model)
    recorder = DeltaRecorder(targets)
    try:
        for state in states:
            for name, of_pool in state.items():
                recorder.record(name, of_pool.slot_ids)
            write(state, targets, on_top=True)
        yield
    finally:
        recorder.delta().invert().apply(targets)
