"""compare."""

import argparse
from pathlib import Path
from typing import Any

from sparsemem import console
from sparsemem.cli.model import add_probes, add_prompt
from sparsemem.cli.options import add_command, add_config_options, config_from
from sparsemem.config import FinetuneConfig, MemoryConfig, to_json
from sparsemem.errors import ConfigError, MissingDependencyError, RunFailedError

PER_RUN = ("method", "learning_rate", "seed")
"""Options that `compare` takes lists of."""


def add_compare(commands: Any) -> None:
    """Add `compare`."""
    parser = add_command(
        commands,
        "compare",
        "measure learning against forgetting for several methods, as JSON, table and plot",
        "sparsemem compare HuggingFaceTB/SmolLM2-135M-Instruct facts.jsonl --background wiki.txt \\\n"
        "    --methods memory,lora,full --learning-rate lora=1e-4,2e-4 --seeds 0,1,2 --out compared",
        compare,
    )
    parser.add_argument("model", metavar="MODEL", help="Hub id, local folder or .gguf file")
    parser.add_argument("facts", metavar="FACTS", help="facts or documents: .jsonl, .txt, .parquet, Hub")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the results; goes on there")
    parser.add_argument(
        "--methods", default="memory,lora,full", metavar="A,B",
        help='what to compare: "memory", "full" or PEFT types (default: memory,lora,full)',
    )  # fmt: skip
    parser.add_argument(
        "--learning-rate", dest="learning_rates", nargs="+", default=[], metavar="METHOD=X,Y",
        help="learning rates to try of a method; the table shows the best (default: as learn has it)",
    )  # fmt: skip
    parser.add_argument("--seeds", default="0", metavar="N,N", help="seeds to run each with (default: 0)")
    parser.add_argument(
        "--background", nargs="+", default=[], metavar="TEXT",
        help='ordinary text, for "memory", penalties and replay: .txt, .jsonl with "text", .parquet, Hub',
    )  # fmt: skip
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: 1)")
    add_probes(parser)
    add_prompt(parser)
    add_config_options(parser, FinetuneConfig, "training", leave_out=PER_RUN)
    add_config_options(parser, MemoryConfig, "memory", leave_out=("seed",))


def compare(args: argparse.Namespace) -> None:
    """Run `compare`."""
    runs = grids(args)
    from sparsemem.evaluation.statistics import check_scipy
    from sparsemem.study.sweep import expand, run_all

    if any(len(method["grid"]["seed"]) > 1 for method in runs.values()):
        check_scipy()
    out = Path(args.out)
    specs = {name: spec for method in runs for name, spec in expand(method, runs[method]).items()}
    failed = run_all(specs, out / "results", jobs=args.jobs, cache=out / "cache")
    report = {"out": str(out), "failed": failed, **show(out, [name for name in specs if name not in failed])}
    if args.json:
        console.emit_json(report)
    if failed:
        raise RunFailedError(f"{len(failed)} of {len(specs)} runs failed; run the same again to repeat those")


def grids(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Turn the command line into options of `RunSpec` with a grid, by method.

    Raises:
        ConfigError: An option cannot be read.
    """
    methods = args.methods.split(",")
    rates = dict(_rates(item, methods) for item in args.learning_rates)
    seeds = _numbers(args.seeds, int, "--seeds", "0,1,2")
    common = {
        "model": args.model,
        "facts": args.facts,
        "probes": args.probes if args.probes is not None else _built_in_probes(),
        "background": args.background,
        "prompt": args.prompt,
        "memory": to_json(config_from(args, MemoryConfig)),
    }
    config = to_json(config_from(args, FinetuneConfig))
    return {
        method: {
            **common,
            "config": {**config, "method": method},
            "grid": {"learning_rate": rates[method], "seed": seeds} if method in rates else {"seed": seeds},
        }
        for method in methods
    }


def _rates(item: str, methods: list[str]) -> tuple[str, list[float]]:
    method, equals, text = item.partition("=")
    if not equals:
        raise ConfigError(f"--learning-rate {item} names no method; write lora=1e-4,2e-4")
    if method not in methods:
        raise ConfigError(f"--learning-rate {item} is for none of the methods {', '.join(methods)}; add it")
    return method, _numbers(text, float, f"--learning-rate {method}", "1e-4,2e-4")


def _numbers(text: str, kind: Any, option: str, example: str) -> list[Any]:
    try:
        return [kind(word) for word in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} {text!r} are no numbers; write {example}") from None


def show(out: Path, names: list[str]) -> dict[str, Any]:
    """Print the table of some runs, draw their plot beside the results, and return their metrics."""
    from sparsemem.files import read_json
    from sparsemem.study.table import comparison

    results = {name: read_json(out / "results" / f"{name}.json") for name in names}
    plots = []
    if results:
        table = comparison(results).transposed()
        console.table("", table.columns, table.rows)
        plots = _plots(results, out / "pareto.png")
    return {"metrics": {name: run["metrics"] for name, run in results.items()}, "plots": plots}


def _built_in_probes() -> list[str]:
    from sparsemem.study.measure import BUILT_IN_PROBE, built_in_probe

    return [f"{BUILT_IN_PROBE}={built_in_probe()}"]


def _plots(results: dict[str, dict[str, Any]], path: Path) -> list[str]:
    from sparsemem.study.figures import pareto

    try:
        return [str(file) for file in pareto(results, path)]
    except (ConfigError, MissingDependencyError) as error:
        console.say(f"no plot: {error}")
        return []
