import sys

import pytest

from sparsemem.errors import ConfigError, MissingDependencyError
from sparsemem.study import figures
from sparsemem.study.figures import front, pareto, recall_matrices

from .made_up import result

matplotlib = pytest.importorskip("matplotlib")


@pytest.fixture
def results():
    methods = ("memory", "lora", "full")
    return {
        f"{method}.seed-{seed}": result(0.7 - 0.1 * number - 0.01 * seed, 0.1 * number, probes=("nq", "wiki"))
        for number, method in enumerate(methods)
        for seed in range(2)
    }


@pytest.fixture
def axes(monkeypatch):
    """The axes of the pictures drawn."""
    drawn = []
    original = figures._draw

    def draw(*args, **options):
        figure = original(*args, **options)
        drawn.extend(figure.axes)
        return figure

    monkeypatch.setattr(figures, "_draw", draw)
    return drawn


def test_a_picture_has_a_point_per_run_and_says_in_words_what_it_shows(results, axes, tmp_path):
    files = pareto(results, tmp_path / "pareto.png")
    assert files == [tmp_path / "pareto.png", tmp_path / "pareto.svg"]
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "pareto.svg").read_text(encoding="utf-8")
    (shown,) = axes
    assert shown.get_xlabel() == "forgetting: F1 on nq, relative loss"
    assert shown.get_ylabel() == "learning: F1 of the facts in held-out wordings"
    points = {dots.get_label(): dots.get_offsets().tolist() for dots in shown.collections}
    assert points["lora"] == [[0.1, pytest.approx(0.6)], [0.1, pytest.approx(0.59)]]
    assert list(points) == ["memory", "lora", "full"]
    colors = {tuple(dots.get_facecolor()[0]) for dots in shown.collections}
    lines = {line.get_linestyle() for line in shown.lines}
    assert len(colors) == len(lines) == 3


def test_another_probe_can_be_chosen(results, axes, tmp_path):
    pareto(results, tmp_path / "pareto", probe="wiki")
    (shown,) = axes
    assert shown.get_xlabel() == "forgetting: perplexity on wiki, relative loss"
    with pytest.raises(ConfigError, match="probe 'mmlu' is in none of the results; there are nq, wiki"):
        pareto(results, tmp_path / "pareto", probe="mmlu")


def test_without_held_out_questions_the_trained_ones_are_shown_and_named(axes, tmp_path):
    pareto({"lora.seed-0": result(None, seen=0.3)}, tmp_path / "pareto")
    (shown,) = axes
    assert shown.get_ylabel() == "learning: F1 of the facts in the trained wording"
    assert shown.collections[0].get_offsets().tolist() == [[0.1, 0.3]]


def test_runs_without_the_probe_or_the_measure_are_left_out(results, axes, tmp_path):
    results["other.seed-0"] = result(probes=("wiki",))
    results["lora.seed-0"]["metrics"]["facts"].update(heldout_f1=None, seen_f1=None)
    pareto(results, tmp_path / "pareto", probe="nq")
    points = {dots.get_label(): len(dots.get_offsets()) for dots in axes[0].collections}
    assert points == {"memory": 2, "lora": 1, "full": 2}
    with pytest.raises(ConfigError, match="no run has F1 of facts beside probe 'nq'"):
        pareto({"a": result(None, seen=None)}, tmp_path / "pareto")
    with pytest.raises(ConfigError, match="nothing was probed"):
        pareto({"a": result(probes=())}, tmp_path / "pareto")


def test_the_front_is_what_no_other_point_beats():
    points = [(0.3, 0.9), (0.1, 0.5), (0.2, 0.4), (0.1, 0.2), (0.4, 0.9), (0.25, 0.6)]
    beaten = {
        (x, y) for x, y in points for u, v in points if (u, v) != (x, y) and u <= x and v >= y
    }  # fmt: skip
    assert front(points) == sorted(set(points) - beaten)


def test_the_same_results_give_the_same_picture(results, tmp_path):
    first, second = (pareto(results, tmp_path / name / "pareto") for name in "ab")
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in second]


def test_what_is_missing_is_named(results, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r"sparsemem\[study\]"):
        pareto(results, tmp_path / "pareto")
    assert list(tmp_path.iterdir()) == []


def test_recall_matrices_are_drawn_side_by_side(tmp_path):
    matrices = {"memory": [[0.9], [0.9, 0.8]], "lora": [[1.0], [0.2, 1.0]]}
    files = recall_matrices(matrices, tmp_path / "matrix")
    assert [path.name for path in files] == ["matrix.png", "matrix.svg"]
    again = recall_matrices(matrices, tmp_path / "again")
    assert [path.read_bytes() for path in files] == [path.read_bytes() for path in again]
    other = recall_matrices({**matrices, "lora": [[1.0], [0.3, 1.0]]}, tmp_path / "other")
    assert files[1].read_bytes() != other[1].read_bytes()
