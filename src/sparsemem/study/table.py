"""Results as a table: what each method learned, what it forgot, and how sure that is."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sparsemem.errors import ConfigError
from sparsemem.evaluation.metrics import mean
from sparsemem.evaluation.probes import LOWER_IS_BETTER
from sparsemem.evaluation.statistics import mean_interval, paired_bootstrap
from sparsemem.study.results import Results, best_runs, probe_names

METRIC_NAMES = {"f1": "F1", "accuracy": "accuracy", "nll": "NLL", "perplexity": "perplexity"}

NOTHING = "\u2013"

Get = Callable[[Mapping[str, Any]], float | None]
"""Takes a number from the metrics of a run; None where there is none."""


@dataclasses.dataclass(frozen=True)
class Table:
    """Column titles, and rows of as many cells."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """Write the table as Markdown."""
        lines = [self.columns, ("---",) * len(self.columns), *self.rows]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    def transposed(self) -> "Table":
        """Turn rows into columns: few methods and many measures fit a terminal that way."""
        columns, *rows = zip(self.columns, *self.rows, strict=True)
        return Table(columns, tuple(rows))


@dataclasses.dataclass(frozen=True)
class _Column:
    """A number per run, and the one the base model starts from."""

    title: str
    get: Get
    form: str
    base: Get | None = None

    def heading(self, runs: Sequence[Mapping[str, Any]]) -> str:
        base = _known(self.base, runs) if self.base else []
        return f"{self.title} (base {mean(base):.3f})" if base else self.title

    def cell(self, runs: Sequence[Mapping[str, Any]]) -> str:
        """Mean over runs, and half of the interval around it where there are several."""
        values = _known(self.get, runs)
        if not values:
            return NOTHING
        interval = mean_interval(values)
        if interval.low is None or interval.high is None:
            return f"{interval.mean:{self.form}}"
        half = (interval.high - interval.low) / 2
        return f"{interval.mean:{self.form}} \u00b1 {half:{self.form.lstrip('+')}}"


def comparison(results: Results, development: Results | None = None) -> Table:
    """Put methods side by side, each at its best setting.

    Means over seeds with 95 % intervals. F1 and accuracy of a probe are given as differences to the
    base model, likelihoods and perplexity relative to it; "kept" is the share of the answers right
    before that still are.

    Args:
        results: Runs to show.
        development: Runs to choose settings by; the same ones if not given.
    """
    best = best_runs(results, development)
    metrics = {method: [run["metrics"] for run in runs] for method, runs in best.items()}
    everything = [values for runs in metrics.values() for values in runs]
    columns = _columns(results)
    rows = tuple(
        (
            method,
            f"{best[method][0]['config']['learning_rate']:g}",
            str(len(best[method])),
            *(column.cell(metrics[method]) for column in columns),
        )
        for method in best
    )
    headings = (column.heading(everything) for column in columns)
    return Table(("method", "learning rate", "seeds", *headings), rows)


def paired(results: Results, development: Results | None = None) -> Table:
    """Say how sure differences are: 95 % bootstrap intervals over the same questions, seeds averaged.

    Args:
        results: Runs to show; the first method is what the others' learning is compared with.
        development: Runs to choose settings by; the same ones if not given.

    Returns:
        Held-out F1 against the first method, and the scores of each probe against the base model.
    """
    best = best_runs(results, development)
    first = next(iter(best))
    everything = [run for runs in best.values() for run in runs]
    probes = list(dict.fromkeys(name for run in everything for name in run["scores"]["after"]["probes"]))
    rows = []
    for method, runs in best.items():
        learned, reference = (_scores(of, "after", "heldout") for of in (runs, best[first]))
        differences = [
            NOTHING if method == first or not (learned and reference) else _interval(learned, reference)
        ]
        for name in probes:
            probed = [run for run in runs if name in run["scores"]["after"]["probes"]]
            after, before = (_scores(probed, when, "probes", name) for when in ("after", "before"))
            differences.append(_interval(after, before) if probed else NOTHING)
        rows.append((method, *differences))
    titles = (f"{_probe_title(name, results)} against base" for name in probes)
    return Table(("method", f"held-out F1 against {first}", *titles), tuple(rows))


def _scores(runs: Sequence[Mapping[str, Any]], when: str, *path: str) -> list[float]:
    """Mean score of each question over runs."""
    of_runs = []
    for run in runs:
        scores: Any = run["scores"][when]
        for name in path:
            scores = scores[name]
        of_runs.append(scores)
    return [mean(of_question) for of_question in zip(*of_runs, strict=True)]


def _interval(a: Sequence[float], b: Sequence[float]) -> str:
    interval = paired_bootstrap(a, b)
    if interval.low is None or interval.high is None:
        return f"{interval.mean:+z.3f}"
    return f"{interval.mean:+z.3f} ({interval.low:+z.3f} to {interval.high:+z.3f})"


def with_block(text: str, name: str, block: str) -> str:
    """Return a text with what stands between `<!-- name:begin -->` and `<!-- name:end -->` replaced.

    Raises:
        ConfigError: The text has no such place.
    """
    begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->\n"
    head, found_begin, rest = text.partition(begin)
    _, found_end, tail = rest.partition(end)
    if not (found_begin and found_end):
        raise ConfigError(f"there is no place for the block; put in lines {begin.strip()} and {end.strip()}")
    return head + begin + block + end + tail


def _columns(results: Results) -> list[_Column]:
    facts = [
        _Column(f"{label} F1", _at("facts", key), ".3f", base=_at("facts", "before", key))
        for label, key in (("held-out", "heldout_f1"), ("seen", "seen_f1"))
    ]
    changed = _Column("numbers changed", _at("changed_fraction"), ".2%")
    return [*facts, *(c for name in probe_names(results) for c in _probe_columns(name, results)), changed]


def _probe_columns(name: str, results: Results) -> list[_Column]:
    metric = _probe_metric(name, results)
    before, after = _at("probes", name, "before"), _at("probes", name, "after")
    title = f"{_probe_title(name, results)}, change"
    if metric in LOWER_IS_BETTER:
        return [_Column(title, _at("probes", name, "forgetting"), "+z.1%", base=before)]
    change = _Column(title, _difference(before, after), "+z.3f", base=before)
    kept = _Column(f"{name} kept", _at("probes", name, "retention"), ".1%")
    return [kept, change] if metric == "f1" else [change]


def _probe_metric(name: str, results: Results) -> str:
    probes = (run["metrics"]["probes"] for run in results.values())
    metric: str = next(probe[name]["metric"] for probe in probes if name in probe)
    return metric


def _probe_title(name: str, results: Results) -> str:
    metric = _probe_metric(name, results)
    return f"{name} {METRIC_NAMES.get(metric, metric)}"


def _at(*path: str) -> Get:
    def get(metrics: Mapping[str, Any]) -> float | None:
        value: Any = metrics
        for name in path:
            value = value.get(name) if value else None
        return None if value is None else float(value)

    return get


def _difference(before: Get, after: Get) -> Get:
    def get(metrics: Mapping[str, Any]) -> float | None:
        old, new = before(metrics), after(metrics)
        return None if old is None or new is None else new - old

    return get


def _known(get: Get, runs: Sequence[Mapping[str, Any]]) -> list[float]:
    return [value for value in map(get, runs) if value is not None]
