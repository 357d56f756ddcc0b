"""Where a number comes from: code, versions, machine, model and data."""

import hashlib
import os
import platform
import resource
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import sparsemem

PACKAGES = ("torch", "transformers", "peft", "safetensors", "numpy")


def provenance(*, model_sha: str = "", data: Iterable[str | Path] = ()) -> dict[str, Any]:
    """Describe this process and what it worked on, as plain JSON values.

    Args:
        model_sha: Fingerprint of the base model.
        data: Files whose content was used.

    Returns:
        commit and dirty (of the source tree sparsemem runs from; None outside of one), versions,
        hardware, peak_bytes (of this process), model_sha, data_sha.
    """
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None
        if (status := _git("status", "--porcelain", "--untracked-files=no")) is None
        else bool(status),
        "versions": versions(),
        "hardware": {
            "machine": platform.machine(),
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "peak_bytes": peak_bytes(),
        "model_sha": model_sha,
        "data_sha": data_sha(data),
    }


def peak_bytes() -> int:
    """Most memory this process has held so far."""
    # Linux counts in units of 1,024 bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def data_sha(paths: Iterable[str | Path]) -> str:
    """Digest of the content of files, in their order; "" of none."""
    digest = hashlib.sha256()
    found = False
    for path in paths:
        digest.update(Path(path).read_bytes())
        found = True
    return digest.hexdigest() if found else ""


def versions() -> dict[str, str]:
    """Versions of this library, of Python, and of the packages results depend on."""
    found = {"sparsemem": sparsemem.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _git(*arguments: str) -> str | None:
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
