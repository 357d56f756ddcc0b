"""Load the model under the memory: a Hub id, a local folder or a GGUF file."""

import contextlib
import hashlib
import importlib.util
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from sparsemem.errors import ConfigError, MissingDependencyError, MissingFileError, ModelMismatchError
from sparsemem.files import file_sha256, new_folder

CPU = torch.device("cpu")
SAMPLE = 256
"""Values per weight that go into a fingerprint."""


def load_base_model(
    name: str, *, dtype: torch.dtype | str = torch.float32, device: torch.device | str = "cpu"
) -> tuple[Any, Any]:
    """Load a causal LM and its tokenizer.

    Args:
        name: A Hub id, a local folder, or a .gguf file. The latter is de-quantized once and kept as
            safetensors under $XDG_CACHE_HOME/sparsemem.
        dtype: Of the weights: a torch dtype or its name.
        device: Where to put it; "auto" is a GPU of CUDA where there is one, else the CPU.

    Returns:
        Model in evaluation mode, and tokenizer.

    Raises:
        MissingFileError: `name` is neither a file or folder nor a model that could be loaded.
        ConfigError: This machine has no such device, or no room on it.
    """
    place, dtype = usable_device(device), torch_dtype(dtype)
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        path = _converted(path)
    source = str(path) if path.exists() else name
    try:
        with _quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(source)
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    except (OSError, ValueError, SafetensorError) as error:
        raise MissingFileError(
            f"{name} is neither a local model nor one that could be fetched: {str(error).splitlines()[0]}"
        ) from error
    # A folder under the cache means nothing to the next machine; what the user named does.
    model.config._name_or_path = name
    try:
        return model.eval().to(place), tokenizer
    except torch.OutOfMemoryError as error:
        raise ConfigError(f"{name} in {dtype} does not fit on {place}; use bfloat16 or the CPU") from error


def usable_device(device: torch.device | str) -> torch.device:
    """Find a device by its name.

    Raises:
        ConfigError: This machine has no such device.
    """
    if device == "auto":
        # Of several processes each has one of its own, see `distributed.processes`.
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else CPU
    try:
        one = torch.zeros(1, device=device)
        one.tolist()  # which "meta" has nothing for
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].split(". ")[0].rstrip(".")
        raise ConfigError(f"device={str(device)!r} is not usable here ({reason}); use auto or cpu") from error
    return one.device


def torch_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Find a precision of weights by its name.

    Raises:
        ConfigError: It is none.
    """
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"dtype={dtype!r} is no precision of weights; use float32 or bfloat16")
    return found


def fingerprint(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Digest of a model's weights, from a sample of each.

    Rounded to bfloat16, so that a model is recognised whether it was loaded in float32 or bfloat16.

    Args:
        weights: Names and weights, as of `named_parameters()`.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(weights, key=lambda item: item[0]):
        flat = weight.detach().flatten()
        step = max(1, flat.numel() // SAMPLE)
        sample = flat[::step].to(torch.bfloat16).view(torch.int16).cpu().contiguous()
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def check_fingerprint(model: nn.Module, expected: str, where: Path) -> None:
    """Raise ModelMismatchError unless `model`, still without a memory, is the one a memory was saved for."""
    found = fingerprint(model.named_parameters())
    if found != expected:
        raise ModelMismatchError(
            f"{where} was made for a base model with fingerprint {expected[:12]}, this one "
            f"({getattr(model, 'name_or_path', '?')}) has {found[:12]}; pass the model it was attached to"
        )


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Loading is announced by our own progress bar, not by two."""
    verbosity, had_bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if had_bars:
            transformers_logging.enable_progress_bar()


def _converted(path: Path) -> Path:
    """Return the folder with a GGUF file's weights as safetensors; make it if it is not there."""
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist; check the path")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sparsemem"
    folder = cache / f"{path.stem}-{file_sha256(path)[:12]}"
    if folder.is_dir():
        return folder
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise MissingDependencyError(
                f"reading {path.name} needs {package}; pip install 'sparsemem[gguf]'"
            )
    with _quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    # The weights are plain float32 now, so nothing about quantization may be saved with them.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with new_folder(folder) as temporary, _quiet_transformers():
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return folder
