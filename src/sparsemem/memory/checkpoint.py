"""A folder that holds a memory: what it is, its weights, and the updates since.

    memory_config.json              format, base model and MemoryConfig; written last
    memory.safetensors              queries, keys, gates; rows written before the first update
    base.<pool>.safetensors         read-only values behind a pool, if it has any (memory-mapped)
    background_usage.safetensors    counts (slots/usage.py)

That is the memory as attached; what it learned since is kept beside it by `sparsemem.store`.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparsemem.memory.base_model as base_models
from sparsemem import distributed
from sparsemem.config import MemoryConfig, from_json, to_json
from sparsemem.errors import (
    CheckpointError,
    MissingFileError,
    SparsememError,
)
from sparsemem.files import (
    check_format,
    check_new,
    file_sha256,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from sparsemem.memory.attach import (
    attach_memory,
    check_detached,
    detach_memory,
    memory_config,
    memory_layers,
    pools,
    unwrapped,
)
from sparsemem.memory.layer import MemoryLayer

CONFIG_FILE = "memory_config.json"
WEIGHTS_FILE = "memory.safetensors"
FORMAT = "sparsemem-memory"
FORMAT_VERSION = 4
"""2: slots are numbered in shells (memory/lookup.py). 4: the score of a row with relations is another."""


def save(model: nn.Module, path: str | Path, base_model: str | None = None) -> None:
    """Save a model's memory with all rows it has now; the base model itself is only named.

    Args:
        model: A model with a memory.
        path: A folder that is empty or does not exist.
        base_model: How to find the base model again; by default the name it was loaded by.

    Raises:
        ExistsError: The folder is not empty; updates are added to it by a DeltaStore.
        OutputError: It could not be written.
        ConfigError: The model is spread over processes.
    """
    path = Path(path)
    distributed.check_whole(model, "saving")
    check_new(path)
    hf_model = unwrapped(model)
    tensors: dict[str, Tensor] = {}
    for layer in memory_layers(model):
        prefix = f"layers.{layer.block_index}"
        tensors.update({f"{prefix}.{name}": tensor for name, tensor in _weights(layer).items()})
    bases = {}
    for name, pool in pools(model).items():
        tensors[f"pools.{name}.slot_ids"], tensors[f"pools.{name}.rows"] = pool.written()
        if pool.base is not None:
            bases[name] = f"base.{name}.safetensors"
            write_tensors(path / bases[name], {"values": pool.base}, FORMAT, FORMAT_VERSION, {})
    write_tensors(path / WEIGHTS_FILE, tensors, FORMAT, FORMAT_VERSION, {})
    write_json(
        path / CONFIG_FILE,
        {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "base_model": base_model or hf_model.name_or_path,
            "weights_sha256": file_sha256(path / WEIGHTS_FILE),
            "base_fingerprint": base_models.fingerprint(base_weights(hf_model)),
            "bases": bases,
            "memory": to_json(memory_config(model)),
        },
    )


def load(
    path: str | Path,
    base_model: str | Any | None = None,
    *,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Any, Any]:
    """Rebuild a model with its memory as it was saved; what was committed since is not in it.

    Args:
        path: A folder made by `save` or `sparsemem attach`, or the Hub id of one.
        base_model: Name of the base model, or the loaded model itself (it is changed in place), if
            it is no longer where it was when the memory was saved.
        dtype: Of the base model's weights, where it is loaded here: a torch dtype or its name.
        device: Where it is put then; "auto" is a GPU of CUDA where there is one, else the CPU.

    Returns:
        Model in evaluation mode, and tokenizer (None if a loaded model was passed).

    Raises:
        ConfigError: This machine has no such device.
        MissingFileError: The folder or the base model is not there.
        CheckpointError: A file is damaged, foreign or of a newer format.
        ModelMismatchError: The base model is another one.
    """
    folder = local_folder(path)
    header = read_header(folder)
    # A folder made before there were these goes on without them.
    before = {"quorum": 0.0, "output_depth": 0.0, "relation_dim": 0}
    config = from_json(MemoryConfig, before | header["memory"], folder / CONFIG_FILE)
    check_weights(folder, header)
    tensors, _ = read_tensors(folder / WEIGHTS_FILE, FORMAT, FORMAT_VERSION)
    bases = {name: _mapped(folder / file) for name, file in header.get("bases", {}).items()}
    if base_model is None or isinstance(base_model, str):
        model, tokenizer = _checked_base_model(
            base_model or header["base_model"], header, folder, dtype, device
        )
    else:
        model, tokenizer = base_model, None
        check_detached(model)
        base_models.check_fingerprint(model, header["base_fingerprint"], folder)
    attach_memory(model, config, bases)
    try:
        _fill(model, tensors, folder / WEIGHTS_FILE)
    except SparsememError:
        detach_memory(model)
        raise
    return model, tokenizer


def _checked_base_model(
    name: str, header: dict[str, Any], folder: Path, dtype: torch.dtype | str, device: torch.device | str
) -> tuple[Any, Any]:
    # float16 rounds otherwise than the fingerprint does, so there the check has a copy of its own.
    dtype = base_models.torch_dtype(dtype)
    exact = torch.float32 if dtype == torch.float16 else dtype
    model, tokenizer = base_models.load_base_model(name, dtype=exact, device=device)
    base_models.check_fingerprint(model, header["base_fingerprint"], folder)
    if dtype != exact:
        model, tokenizer = base_models.load_base_model(name, dtype=dtype, device=device)
    return model, tokenizer


def base_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield names and weights of the model as it was before `attach_memory`."""
    memory = {id(p) for layer in memory_layers(model) for p in layer.parameters()}
    yield from ((name, p) for name, p in model.named_parameters() if id(p) not in memory)
    for path, module in model.named_modules():
        if isinstance(module, MemoryLayer):
            for ffn in module.replaced:
                yield from ((f"{path}.{name}", p) for name, p in ffn.named_parameters())


def read_header(folder: Path) -> dict[str, Any]:
    """Read and check `memory_config.json`; raises as `load` does."""
    if not (folder / CONFIG_FILE).is_file():
        raise MissingFileError(
            f"{folder} holds no {CONFIG_FILE}; make it with: sparsemem attach MODEL --out {folder}"
        )
    header = read_json(folder / CONFIG_FILE)
    check_format(folder / CONFIG_FILE, header, FORMAT, FORMAT_VERSION)
    version = int(header["format_version"])
    if version < 2:
        raise CheckpointError(
            f"{folder / CONFIG_FILE} has format version {version}, which numbers slots in another order; "
            "attach anew, and teach it again"
        )
    missing = {"base_model", "base_fingerprint", "weights_sha256", "memory"} - set(header)
    if missing:
        raise CheckpointError(f"{folder / CONFIG_FILE} lacks {sorted(missing)[0]!r}; restore it from a copy")
    options = header["memory"]
    if version < 4 and isinstance(options, dict) and options.get("relation_dim", 0) != 0:
        raise CheckpointError(
            f"{folder / CONFIG_FILE} has format version {version}, by which rows score otherwise; "
            "attach anew, and teach it again"
        )
    return header


def check_weights(folder: Path, header: dict[str, Any]) -> None:
    """Raise CheckpointError unless the memory's weights are those its header names."""
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist; restore it from a copy")
    if file_sha256(path) != header["weights_sha256"]:
        raise CheckpointError(
            f"{path} is damaged: it is not the file {CONFIG_FILE} names; restore it from a copy"
        )


def local_folder(path: str | Path) -> Path:
    """Return a folder itself, or the local copy of a Hub repository of that name."""
    if Path(path).is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise MissingFileError(
            f"{path} is neither a local folder nor a Hub repository that could be fetched: "
            f"{str(error).splitlines()[0]}"
        ) from error


def _weights(layer: MemoryLayer) -> dict[str, Tensor]:
    """Return queries, keys, scale and gate; the pool is saved by itself, since layers may share it."""
    return {name: tensor for name, tensor in layer.state_dict().items() if not name.startswith("pool.")}


@torch.no_grad()
def _fill(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    used = set()
    for layer in memory_layers(model):
        for name, tensor in _weights(layer).items():
            key = f"layers.{layer.block_index}.{name}"
            used.add(key)
            tensor.copy_(_expect(tensors, key, tensor.shape, path))
    for name, pool in pools(model).items():
        keys = f"pools.{name}.slot_ids", f"pools.{name}.rows"
        used.update(keys)
        slot_ids = _expect(tensors, keys[0], None, path)
        rows = _expect(tensors, keys[1], (len(slot_ids), pool.value_dim), path)
        pool.write(slot_ids, rows)
    if extra := set(tensors) - used:
        raise CheckpointError(f"{path} holds {sorted(extra)[0]!r}, which {CONFIG_FILE} does not account for")


def _expect(tensors: dict[str, Tensor], key: str, shape: Any, path: Path) -> Tensor:
    if key not in tensors or (shape is not None and tensors[key].shape != torch.Size(shape)):
        found = tuple(tensors[key].shape) if key in tensors else "missing"
        wanted = "" if shape is None else f", {CONFIG_FILE} wants {tuple(shape)}"
        raise CheckpointError(f"{path}: {key} is {found}{wanted}; restore it from a copy")
    return tensors[key]


def _mapped(path: Path) -> Tensor:
    """Open a base table without reading it: the pages that are read are the rows that are hit."""
    tensors, _ = read_tensors(path, FORMAT, FORMAT_VERSION)
    return _expect(tensors, "values", None, path)
