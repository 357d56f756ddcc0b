"""Results of many runs: read, grouped by method, and the best setting of each."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsemem.config import FinetuneConfig, applicable
from sparsemem.errors import ConfigError, MissingFileError
from sparsemem.evaluation.metrics import mean
from sparsemem.files import read_json

Results = Mapping[str, dict[str, Any]]
"""What `perform` returned, by the name of the run."""

SETTING = [field.name for field in dataclasses.fields(FinetuneConfig) if field.name != "seed"]


def load_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Read the results in a folder.

    Raises:
        MissingFileError: There is none.
        CheckpointError: One is not a JSON object.
    """
    results = {path.stem: read_json(path) for path in sorted(folder.glob("*.json"))}
    if not results:
        raise MissingFileError(f"{folder} holds no result; run something first")
    return results


def method_of(name: str) -> str:
    """What a run compares: the part of its name before the first dot."""
    return name.partition(".")[0]


def learning_metric(result: Mapping[str, Any]) -> str | None:
    """What methods are chosen by: F1 in held-out wordings, or in the trained ones if there are no others."""
    facts = result["metrics"]["facts"]
    return next((name for name in ("heldout_f1", "seen_f1") if facts[name] is not None), None)


def learning(result: Mapping[str, Any]) -> float | None:
    """The value of `learning_metric`; None if facts were asked for in no wording."""
    metric = learning_metric(result)
    return None if metric is None else float(result["metrics"]["facts"][metric])


def probe_names(results: Results) -> list[str]:
    """Names of all probes, in the order of the first run that has them."""
    return list(dict.fromkeys(name for run in results.values() for name in run["metrics"]["probes"]))


def best_runs(results: Results, development: Results | None = None) -> dict[str, list[dict[str, Any]]]:
    """Take the runs of each method at its best setting: all options of training but the seed.

    Args:
        results: Runs to take from.
        development: Runs to choose by, best mean `learning`; those taken from if not given.

    Returns:
        Runs by method, one per seed, methods in the order of `results`.

    Raises:
        ConfigError: A method has no run here at the setting that was chosen, or two of one seed.
    """
    chosen = {
        method: max(settings, key=lambda setting: mean([learning(run) or 0.0 for run in settings[setting]]))
        for method, settings in _by_setting(development or results).items()
    }
    best = {}
    for method, settings in _by_setting(results).items():
        setting = chosen.get(method)
        if setting not in settings:
            raise ConfigError(
                f"{method} has no run at the setting that was best in development "
                f"({setting or 'no run there either'}); run that"
            )
        best[method] = settings[setting]
    return best


def _by_setting(results: Results) -> dict[str, dict[str, list[dict[str, Any]]]]:
    grouped: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for name, run in results.items():
        config = applicable(run["config"])
        options = {option: config[option] for option in SETTING if option in config}
        settings = grouped.setdefault(method_of(name), {})
        runs = settings.setdefault(json.dumps(options, sort_keys=True), [])
        if run["seed"] in [other["seed"] for other in runs]:
            raise ConfigError(f"{name} has the setting and seed of another run of that method; remove one")
        runs.append(run)
    return grouped
