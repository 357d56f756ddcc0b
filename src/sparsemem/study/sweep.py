"""Many runs: a grid of options, each run in a process of its own, each result a file."""

import contextlib
import hashlib
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from sparsemem import console
from sparsemem.config import applicable, from_json, to_json
from sparsemem.errors import ConfigError, MissingFileError
from sparsemem.evaluation.probes import load_probes
from sparsemem.files import read_json, write_json
from sparsemem.study.provenance import data_sha
from sparsemem.study.run import RunSpec
from sparsemem.training.baselines import check_method

GRACE_SECONDS = 3.0
"""What a process gets to end by itself after Ctrl-C, which a terminal sends to all of them."""

PLACES = ("model", "facts", "probes", "background")
"""Options that are paths, which differ between machines; their last parts do not."""


def expand(name: str, options: Mapping[str, Any]) -> dict[str, RunSpec]:
    """Build the runs of a grid.

    Args:
        name: What all of them are called, without a dot: the row of a table.
        options: Options of `RunSpec`; and under "grid", lists of values of options of its `config`.

    Returns:
        Specs by name, such as "lora.learning_rate-0.0001.seed-0"; the seed is always last.

    Raises:
        ConfigError: An option is unknown or cannot work, or two runs would have one name.
    """
    if not re.fullmatch(r"[\w-]+", name):
        raise ConfigError(f"run {name!r} is no name; use letters, digits, hyphens and underscores")
    common = dict(options)
    grid = _lists(name, common.pop("grid", None) or {})
    specs: dict[str, RunSpec] = {}
    for values in itertools.product(*grid.values()):
        point = dict(zip(grid, values, strict=True))
        full_name = ".".join([name, *(f"{option}-{_label(value)}" for option, value in point.items())])
        if full_name in specs:
            raise ConfigError(f"{name}: two runs are named {full_name}; give different values")
        config = {**common.get("config", {}), **point}
        specs[full_name] = from_json(RunSpec, {**common, "config": config}, name)
    return specs


def check(specs: Collection[RunSpec]) -> None:
    """Find what cannot work before the hours that would be lost on it.

    Raises:
        SparsememError: A method, model or source is not there, or a row is malformed.
    """
    for method in {spec.finetune_config.method for spec in specs}:
        check_method(method)
    for model in {spec.model for spec in specs}:
        _check_model(model)
    for spec in {(spec.facts, spec.first_fact, spec.num_facts): spec for spec in specs}.values():
        spec.load_facts()
    for probes in {spec.probes for spec in specs}:
        load_probes(probes)
    for spec in {(spec.background, spec.needs_background): spec for spec in specs}.values():
        spec.load_background()


def run_all(specs: Mapping[str, RunSpec], results: Path, *, jobs: int = 1, cache: Path) -> dict[str, str]:
    """Perform the runs that have no result yet, each in a process of its own.

    So one that crashes takes no other with it, and `peak_bytes` is its own. After Ctrl-C, or a
    failure, the same call goes on where this one ended.

    Args:
        specs: What to do, by name.
        results: Folder of the results, NAME.json each.
        jobs: Runs at a time; the cores are shared among them.
        cache: Folder for what runs share, and for their logs.

    Returns:
        The last line of the error of each run that failed, by name.

    Raises:
        ConfigError: A result is of another run of that name.
        SparsememError: Something given is not usable; nothing was run.
    """
    if jobs < 1:
        raise ConfigError(f"jobs={jobs} is not positive; use 1 or more")
    paths = {name: results / f"{name}.json" for name in specs}
    for name in filter(lambda name: paths[name].exists(), specs):
        _check_same(paths[name], specs[name])
    waiting = [name for name in specs if not paths[name].exists()]
    check([specs[name] for name in waiting])
    logs = {name: _log_folder(results, cache) / f"{name}.log" for name in waiting}
    num_done = 0
    failed: dict[str, str] = {}
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                name = waiting.pop(0)
                running[name] = _start(specs[name], paths[name], logs[name], jobs, cache)
            name = _next_to_end(running)
            process = running.pop(name)
            num_done += 1
            outcome = "done"
            if process.returncode:
                failed[name] = outcome = _reason(process, logs[name])
            console.say(f"[{num_done}/{len(logs)}] {name}: {outcome}")
    finally:
        _stop(running.values())
    return failed


def _lists(name: str, grid: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Check a grid, and put the seed last."""
    for option, values in grid.items():
        if not isinstance(values, list | tuple) or not values:
            raise ConfigError(f"{name}: grid {option}={values!r} is no list of values; write [1, 2]")
    return {option: list(grid[option]) for option in sorted(grid, key=lambda option: option == "seed")}


def _label(value: Any) -> str:
    return re.sub(r"[^\w.+-]+", "-", str(value)).strip("-")


def _check_model(name: str) -> None:
    if name.endswith(".gguf"):
        if not Path(name).expanduser().is_file():
            raise MissingFileError(f"{name} does not exist; check the path")
        return
    try:
        AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise MissingFileError(
            f"{name} is neither a local model nor one that could be fetched: {str(error).splitlines()[0]}"
        ) from error


def _check_same(path: Path, spec: RunSpec) -> None:
    """Raise ConfigError if a result is not one of this spec, as far as both know the options."""
    found = read_json(path)
    config = applicable(found.get("config", {}))
    for option, value in spec.described().items():
        before = config.get(option, value)
        if isinstance(value, dict) and isinstance(before, dict):
            same = all(before[name] == value[name] for name in before.keys() & value.keys())
        else:
            same = _named(option, before) == _named(option, value)
        if not same:
            raise ConfigError(
                f"{path} was run with {option}={before!r}, not {value!r}; remove it or choose another folder"
            )
    if found.get("data_sha") != data_sha(spec.files):
        raise ConfigError(f"{path} was run on other data; remove it or choose another folder")


def _named(option: str, value: Any) -> Any:
    """Take the names of what is at a place; other values stay as they are."""
    if option not in PLACES:
        return value
    sources = [value] if isinstance(value, str) else value
    if option != "probes":
        return [Path(source).name for source in sources]
    named = [source.partition("=") for source in sources]
    return [(name, Path(source).name) for name, _, source in named]


def _log_folder(results: Path, cache: Path) -> Path:
    folder = results.resolve()
    digest = hashlib.sha256(str(folder).encode()).hexdigest()[:8]
    return cache / "runs" / f"{folder.parent.name}-{digest}"


def _start(spec: RunSpec, result: Path, log: Path, jobs: int, cache: Path) -> "subprocess.Popen[bytes]":
    write_json(log.with_suffix(".json"), to_json(spec))
    command = [sys.executable, "-m", "sparsemem.study.run", log.with_suffix(".json"), result, cache]
    threads = str(max(1, torch.get_num_threads() // jobs))
    with log.open("wb") as output:
        return subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": threads},
        )


def _next_to_end(running: "Mapping[str, subprocess.Popen[bytes]]") -> str:
    while True:
        for name, process in running.items():
            if process.poll() is not None:
                return name
        time.sleep(0.1)


def _reason(process: "subprocess.Popen[bytes]", log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    if process.returncode < 0:
        return f"ended by {signal.Signals(-process.returncode).name}; see {log}"
    return lines[-1] if lines else f"exit code {process.returncode}; see {log}"


def _stop(processes: "Iterable[subprocess.Popen[bytes]]") -> None:
    """End runs as Ctrl-C does, so that each removes what it had half-written."""
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
