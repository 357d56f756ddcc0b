from html.parser import HTMLParser

import pytest
from tests.study.test_explain_page import result as explained

from sparsemem.study.report_page import page

HOSTILE = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>&amp;"
VOID = {"meta", "input", "br"}


def update(number, text):
    return {
        "number": number,
        "id": f"{number}" * 64,
        "message": text,
        "author": text,
        "time": "2026-01-01T00:00:00+00:00",
        "num_slots": 1234,
        "bytes": 56789,
        "facts": [text],
        "num_forgets": number - 1,
    }


def made_up(text="Zed"):
    """Everything a report can show, with one text wherever a user's can stand."""
    row = {"number": 1, "commit": "1" * 10, "time": "t", "message": text, "num_slots": 1234, "num_facts": 1}
    row |= {"heldout_f1": 0.125, "seen_f1": None, f"before.{text}": 0.5, f"after.{text}": 0.375}
    answer = {"question": text, "wording": "trained", "right": [text], "before": text, "after": text}
    pool = {
        "num_slots": 64,
        "num_written": 16,
        "num_shared": 4,
        "hub_share": 0.0625,
        "hit_share": 0.03,
        "fill": 0.25,
        "taken": 0.375,
    }
    return {
        "folder": text,
        "updates": [update(1, text), update(2, text)],
        "timeline": [row, {**row, "number": 2}],
        "forgetting": [{text: 0.25}, {}],
        "recall": {"method": text, "file": text, "matrix": [[0.75], [0.5, 1.0]]},
        "compared": {
            "points": {text: [(0.0, 0.5), (0.5, 0.75)]},
            "across": text,
            "up": text,
            "columns": ("method", text),
            "rows": [(text, "1")],
            "folder": text,
        },
        "capacity": {
            "pools": {text: pool},
            "recommendation": "nothing",
            "reason": text,
            "disk_bytes": {"memory": 4321},
        },
        "answers": {
            "rows": [{**answer, "f1_before": 0.0, "f1_after": 1.0}] * 2,
            "num_left_out": 3,
            "means": {"trained": {"f1_before": 0.0, "f1_after": 1.0}},
        },
        "heatmaps": [explained(text, text, text)],
        "provenance": {
            "head": "2" * 64,
            "branch": text,
            "time": "t",
            "base_model": text,
            "base_fingerprint": "f",
            "memory": {},
            "config": {"anchor": text},
            "prompt": "qa",
            "learned_with": [{"sparsemem": text}],
            "report": {"commit": "c" * 40, "dirty": True, "versions": {"sparsemem": "1"}},
        },
    }


class Outline(HTMLParser):
    """Tags with their attributes, headings, texts; fails where tags do not match."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, *names):
        return [attributes for tag, attributes in self.tags if tag in names]


def test_hostile_text_is_text_wherever_it_stands():
    harmless, hostile = (Outline(page(made_up(text))) for text in ("Zed", HOSTILE))
    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in harmless.tags]
    assert [set(found) for _, found in hostile.tags] == [set(found) for _, found in harmless.tags]
    in_titles = [text for tag, text in hostile.texts if tag == "title"]
    # Of the page, a point of forgetting, two runs that are compared, and a cell.
    assert sum(HOSTILE in text for text in in_titles) == 5


def test_every_part_can_be_reached_and_is_named():
    found = Outline(page(made_up()))
    ids = [a["id"] for _, a in found.tags if "id" in a]
    assert len(ids) == len(set(ids))
    parts = found.all("section")
    assert [f"#{part['id']}" for part in parts] == [a["href"] for a in found.all("a")]
    assert len(parts) == 8
    assert all(part["aria-labelledby"] in ids for part in parts)
    assert (
        len(found.all("main"))
        == len(found.all("nav"))
        == len(found.all("header"))
        == len(found.all("h1"))
        == 1
    )
    assert len(found.all("caption")) == len(found.all("table"))
    pictures = [svg for svg in found.all("svg") if "aria-hidden" not in svg]
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in pictures)
    # Two charts, the Pareto plot, and a heatmap.
    assert len(pictures) == 4
    (search,) = (field for field in found.all("input"))
    assert search["id"] in [label["for"] for label in found.all("label")]
    assert all("tabindex" in div for div in found.all("div") if div.get("class") == "scroll")


@pytest.mark.parametrize(
    "number",
    [
        "1,234",
        "56,789",
        "0.125",
        "0.375",
        "+25.00%",
        "0.75",
        "25.00%",
        "4,321",
        "16 of 64",
        "3 more questions",
    ],
)
def test_numbers_are_shown(number):
    assert any(number in text for _, text in Outline(page(made_up())).texts)


def test_points_are_drawn_for_what_was_measured_only():
    titles = [text for tag, text in Outline(page(made_up())).texts if tag == "title"]
    assert "held-out wordings: 12.5 % at update 1" in titles
    assert "Zed: 25 % at update 1" in titles
    assert not any(text.startswith(("trained wording:", "Zed: 0 % at update 2")) for text in titles)
    assert "Zed: 75 % at forgetting 50 %" in titles


def test_what_is_missing_leaves_no_empty_part():
    empty = made_up() | {name: [] for name in ("updates", "timeline", "forgetting", "heatmaps")}
    empty |= {"recall": None, "compared": None, "answers": None}
    found = Outline(page(empty))
    assert [text for tag, text in found.texts if tag == "h2"] == [
        "How full the memory is",
        "Answers before and after",
        "Provenance",
    ]
    assert not found.all("input")


def test_it_is_made_for_phones_the_dark_and_paper():
    text = page(made_up())
    for part in ("width=device-width", "prefers-color-scheme: dark", "@media print", "@media (max-width"):
        assert part in text


def test_heads_that_read_one_slot_share_a_cell():
    found = Outline(page(made_up()))
    cells = [rect for rect in found.all("rect") if rect["class"] == "cell"]
    assert len({(rect["x"], rect["y"]) for rect in cells}) == len(cells)
    # The token reads slot 7 three times with a tenth of its weight.
    assert any("slot 7 of layer_1, 30.0% of the reads" in text for _, text in found.texts)
