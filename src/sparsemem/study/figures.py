"""Pictures of results. The only import of matplotlib."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sparsemem.errors import ConfigError, MissingDependencyError
from sparsemem.files import write_atomically
from sparsemem.study.results import Results, learning, learning_metric, method_of, probe_names

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Told apart with any colour vision (Okabe and Ito 2008); markers and lines differ too, for grey prints."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":")

WORDS = {
    "heldout_f1": "F1 of the facts in held-out wordings",
    "seen_f1": "F1 of the facts in the trained wording",
    "f1": "F1",
    "accuracy": "accuracy",
    "nll": "negative log-likelihood",
    "perplexity": "perplexity",
}

Point = tuple[float, float]
"""Forgetting and learning of one run."""


def pareto(results: Results, path: Path, *, probe: str | None = None) -> list[Path]:
    """Draw learning against forgetting: a point per run, and the front of each method as a step line.

    Args:
        results: Runs by name.
        path: The picture, by its name without suffix or with .png.
        probe: What forgetting is measured by; the first probe if not given.

    Returns:
        The files: a PNG and an SVG.

    Raises:
        ConfigError: There is no such probe, or no run has what is drawn.
        MissingDependencyError: matplotlib is not installed.
        OutputError: A file could not be written.
    """
    drawn = pareto_points(results, probe)
    return _save(_draw(drawn.points, drawn.across, drawn.up), path.with_suffix(""))


@dataclasses.dataclass(frozen=True)
class Pareto:
    """Forgetting and learning of runs by method, and what the two directions measure."""

    points: dict[str, list[Point]]
    across: str
    up: str


def pareto_points(results: Results, probe: str | None = None) -> Pareto:
    """Take from results what `pareto` draws; raises ConfigError as it does."""
    names = probe_names(results)
    if not names:
        raise ConfigError("nothing was probed for forgetting; give probes")
    if probe is not None and probe not in names:
        raise ConfigError(f"probe {probe!r} is in none of the results; there are {', '.join(names)}")
    probe = probe or names[0]
    points: dict[str, list[Point]] = {}
    learned_by: list[str] = []
    measures = set()
    for name, run in results.items():
        of_probe = run["metrics"]["probes"].get(probe)
        learned, metric = learning(run), learning_metric(run)
        if of_probe is not None and learned is not None and metric is not None:
            points.setdefault(method_of(name), []).append((of_probe["forgetting"], learned))
            learned_by.append(WORDS[metric])
            measures.add(of_probe["metric"])
    if not points:
        raise ConfigError(f"no run has F1 of facts beside probe {probe!r}; give facts with questions")
    (measure,) = measures
    return Pareto(
        points,
        across=f"forgetting: {WORDS[measure]} on {probe}, relative loss",
        up=f"learning: {' or '.join(dict.fromkeys(learned_by))}",
    )


def recall_matrices(matrices: Mapping[str, Sequence[Sequence[float]]], path: Path) -> list[Path]:
    """Draw what is left of each update after each later one: a triangle per method, side by side.

    Args:
        matrices: By method, a row per update with the recall of all updates so far, 0 to 1.
        path: The picture, by its name without suffix.

    Returns:
        The files: a PNG and an SVG.
    """
    figure = _figure((3.4 * len(matrices) + 0.8, 3.6))
    panels = figure.subplots(1, len(matrices), squeeze=False)[0]
    for axes, (method, rows) in zip(panels, matrices.items(), strict=True):
        size = len(rows)
        filled = [[*row, *[float("nan")] * (size - len(row))] for row in rows]
        image = axes.imshow(filled, vmin=0, vmax=1, cmap="viridis", origin="upper")
        for after, row in enumerate(rows if size <= 12 else ()):
            for learned, value in enumerate(row):
                color = "white" if value < 0.6 else "black"
                axes.text(
                    learned, after, f"{value:.2f}"[1:], ha="center", va="center", fontsize=6, color=color
                )
        axes.set_title(method)
        axes.set_xlabel("facts of update")
        axes.set_ylabel("asked after update")
        places = range(0, size, max(1, size // 10))
        axes.set_xticks(places, [str(place + 1) for place in places])
        axes.set_yticks(places, [str(place + 1) for place in places])
    figure.colorbar(image, ax=list(panels), label="F1", shrink=0.8)
    return _save(figure, path)


def slot_heatmap(
    texts: Sequence[Sequence[str]], weights: Sequence[Sequence[float]], path: Path
) -> list[Path]:
    """Draw which tokens of some texts read which slots.

    Args:
        texts: Tokens of each text.
        weights: A row per token, all texts one after another, with the weight on each slot.
        path: The picture, by its name without suffix.

    Returns:
        The files: a PNG and an SVG.
    """
    tokens = [token.replace("\n", "\\n").strip() or token for text in texts for token in text]
    figure = _figure((7.2, 0.16 * len(tokens) + 1.0))
    axes = figure.add_subplot()
    image = axes.imshow(weights, aspect="auto", cmap="Greys", vmin=0, interpolation="nearest")
    axes.set_yticks(range(len(tokens)), tokens, fontsize=6, parse_math=False)
    axes.set_xlabel("slots of the fact, those that most tokens read first")
    end = 0
    for text in texts[:-1]:
        end += len(text)
        axes.axhline(end - 0.5, color=COLORS[1], linewidth=0.8)
    figure.colorbar(image, ax=axes, label="weight of the reads", shrink=0.8)
    return _save(figure, path)


def front(points: Sequence[Point]) -> list[Point]:
    """Keep the points that no other beats: each learns more than all that forget as little."""
    kept: list[Point] = []
    for forgot, learned in sorted(points, key=lambda point: (point[0], -point[1])):
        if not kept or learned > kept[-1][1]:
            kept.append((forgot, learned))
    return kept


def _draw(points: dict[str, list[Point]], across: str, up: str) -> Any:
    figure = _figure((6.4, 4.4))
    from matplotlib.ticker import PercentFormatter

    axes = figure.add_subplot()
    right = max(point[0] for of_method in points.values() for point in of_method)
    for number, (method, of_method) in enumerate(points.items()):
        color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
        line = LINES[number % len(LINES)]
        best = front(of_method)
        # Who may forget more can always take the point that forgets less.
        steps = [*best, (right, best[-1][1])]
        axes.plot(*zip(*steps, strict=True), line, color=color, drawstyle="steps-post", linewidth=1.2)
        forgot, learned = zip(*of_method, strict=True)
        axes.scatter(
            forgot,
            learned,
            44,
            color,
            marker=marker,
            edgecolor="white",
            linewidth=0.8,
            label=method,
            zorder=3,
        )
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.set_ylim(0, 1.02)
    axes.axvline(0, color="#999999", linewidth=0.8)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    axes.grid(color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def _figure(size: tuple[float, float]) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("a picture needs matplotlib; pip install 'sparsemem[study]'") from error
    # Not by pyplot, which keeps every figure and asks for a display.
    return Figure(figsize=size, layout="constrained")


def _save(figure: Any, path: Path) -> list[Path]:
    from matplotlib import rc_context

    png, svg = path.with_suffix(".png"), path.with_suffix(".svg")
    # The same results give the same bytes: no date, no random ids.
    with rc_context({"svg.hashsalt": "sparsemem"}):
        write_atomically(png, partial(figure.savefig, format="png", dpi=200))
        write_atomically(svg, partial(figure.savefig, format="svg", metadata={"Date": None}))
    return [png, svg]
