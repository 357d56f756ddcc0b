"""Contenders measured in turn (A B A B), since the machines this runs on are shared: only ratios count."""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sparsemem.files import write_json
from sparsemem.study.provenance import provenance

RESULTS = Path(__file__).parent / "results"


def in_turn(contenders: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, Any]]:
    """Run each contender once to warm up, then all of them in turn.

    Returns:
        By contender: `seconds` of each round and their `median_seconds`, the same of the processor's time
        (which others' work on the machine hardly touches while there is one thread), and the `peak_bytes`
        that the first run added to what was held before (None where the system does not tell).
    """
    peaks = {name: _peak_of(run) for name, run in contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    processor: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            started, used = time.perf_counter(), time.process_time()
            run()
            seconds[name].append(time.perf_counter() - started)
            processor[name].append(time.process_time() - used)
    return {
        name: {
            "median_seconds": statistics.median(of),
            "seconds": [round(s, 6) for s in of],
            "median_processor_seconds": statistics.median(processor[name]),
            "processor_seconds": [round(s, 6) for s in processor[name]],
            "peak_bytes": peaks[name],
        }
        for name, of in seconds.items()
    }


def available_bytes() -> int:
    """Memory that can still be taken without swapping."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def restart_peak() -> bool:
    """Let `peak_bytes` start anew; False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def peak_bytes() -> int:
    """Most memory held since `restart_peak`."""
    return _status("VmHWM")


def _peak_of(run: Callable[[], Any]) -> int | None:
    restarted, before = restart_peak(), _status("VmRSS")
    run()
    return max(0, peak_bytes() - before) if restarted else None


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def parser(description: str | None) -> argparse.ArgumentParser:
    """Options of every benchmark."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--json", action="store_true", help="print the result as one JSON object")
    made.add_argument("--save", action="store_true", help="commit it to benchmarks/results")
    return made


def publish(name: str, result: Mapping[str, Any], args: argparse.Namespace, **origin: Any) -> None:
    """Print a result with its provenance, as JSON or beside the committed one; save it if asked to.

    Args:
        name: Name of the benchmark.
        result: `ratios` by name, and whatever is behind them.
        args: From `parser`.
        origin: Arguments of `provenance`.
    """
    path = RESULTS / f"{name}.json"
    # How busy the machine is with others' work: a ratio taken on a full one says less.
    load = round(os.getloadavg()[0], 2)
    result = {"benchmark": name, **result, "seed": 0, "load_average": load, **provenance(**origin)}
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        committed = json.loads(path.read_text(encoding="utf-8")).get("ratios", {}) if path.is_file() else {}
        print(f"{name + ' (ratio of medians)':48} {'now':>8} {'committed':>10}")
        for ratio, value in result["ratios"].items():
            print(f"  {ratio:46} {_cell(value):>8} {_cell(committed.get(ratio)):>10}")
    if args.save:
        write_json(path, result)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
