import re
from xml.etree import ElementTree

import pytest

from sparsemem.study.charts import COLUMN, HEIGHT, ROW, WIDTH, Axis, Series, cells, chart

HOSTILE = "<script>alert('x')</script>\"&"
SVG = re.compile("<svg.*?</svg>", re.DOTALL)


def picture(markup):
    return ElementTree.fromstring(SVG.search(markup)[0])


def points(svg):
    found = {}
    for mark in svg.iter("path"):
        if mark.get("class", "").startswith("point"):
            where = [float(n) for n in re.findall(r"[-\d.]+", mark.get("transform"))]
            found[mark.find("title").text] = where
    return found


def test_points_stand_in_proportion_and_say_their_value():
    svg = picture(
        chart(
            "t", Axis("update", whole=True), Axis("F1", 0, 1), [Series("a", [(1, 0.0), (2, 0.5), (3, 1.0)])]
        )
    )
    found = points(svg)
    assert list(found) == [f"a: {y} % at update {x}" for x, y in ((1, 0), (2, 50), (3, 100))]
    (x1, y1), (x2, y2), (x3, y3) = found.values()
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.1)
    assert y1 - y2 == pytest.approx(y2 - y3, abs=0.1)
    assert 0 < x1 < x3 < WIDTH
    assert 0 < y3 < y1 < HEIGHT


@pytest.mark.parametrize("values", [[0.0], [-0.5, 0.003], [1000.0, 2000.0], [0.25, 0.25]])
def test_every_value_is_inside_the_picture(values):
    series = Series("a", list(enumerate(values)))
    for x, y in points(picture(chart("t", Axis("x"), Axis("y"), [series]))).values():
        assert 0 < x < WIDTH
        assert 0 < y < HEIGHT


def test_a_missing_value_is_a_gap_in_the_line():
    whole = chart("t", Axis("x"), Axis("y"), [Series("a", [(n, 0.5) for n in range(4)])])
    cut = chart("t", Axis("x"), Axis("y"), [Series("a", [(0, 0.5), (1, 0.5), (2, None), (3, 0.5), (4, 0.5)])])
    lines = [
        len([p for p in picture(text).iter("path") if p.get("class") == "line c0"]) for text in (whole, cut)
    ]
    assert lines == [1, 2]
    assert len(points(picture(cut))) == 4


def test_series_differ_in_more_than_colour():
    svg = picture(chart("t", Axis("x"), Axis("y"), [Series(n, [(0, 0), (1, 1)]) for n in "abcd"]))
    lines = [p.get("stroke-dasharray") for p in svg.iter("path") if p.get("class", "").startswith("line")]
    shapes = [p.get("d") for p in svg.iter("path") if p.get("class", "").startswith("point")]
    assert len(set(lines)) == len(set(shapes)) == 4


def test_hostile_names_are_names():
    for markup in (
        chart(HOSTILE, Axis(HOSTILE), Axis(HOSTILE), [Series(HOSTILE, [(0, 0)])]),
        cells(HOSTILE, HOSTILE, [HOSTILE], 1, [(0, 0, 1.0, HOSTILE)]),
    ):
        svg = picture(markup)
        assert {one.tag for one in svg.iter()} <= {"svg", "desc", "path", "text", "rect", "title"}
        assert svg.get("role") == "img"
        assert HOSTILE in svg.get("aria-label")
        assert any(HOSTILE in (one.text or "") for one in svg.iter("title"))
        assert "<script" not in markup


def test_cells_stand_in_their_row_and_column():
    svg = picture(cells("t", "d", ["a", "bc"], 3, [(0, 0, 0.0, "x"), (1, 2, 1.0, "y")]))
    first, second = svg.iter("rect")
    assert float(second.get("x")) - float(first.get("x")) == 2 * COLUMN
    assert float(second.get("y")) - float(first.get("y")) == ROW
    assert (first.get("fill-opacity"), second.get("fill-opacity")) == ("0.25", "1.00")
    assert float(second.get("x")) + COLUMN <= float(svg.get("width"))
