import base64
import hashlib
import re
from html.parser import HTMLParser

from sparsemem.study.document import document, escaped, table

HOSTILE = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>&amp;"


class Cells(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.rows, self.classes = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.classes.append(dict(attrs).get("class"))

    def handle_data(self, data):
        if self.rows and self.rows[-1] and data.strip():
            self.rows[-1][-1] += data


def test_what_is_escaped_comes_back_from_text_and_attributes():
    found = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attrs):
            found.extend([tag, *(value for _, value in attrs)])

        def handle_data(self, data):
            found.append(data)

    Parser().feed(f'<p title="{escaped(HOSTILE)}">{escaped(HOSTILE)}</p>')
    assert found == ["p", HOSTILE, HOSTILE]


def test_only_the_page_s_own_script_may_run():
    text = document("t", "<p>b</p>", script="let a = '\u00e9';")
    (script,) = re.findall("<script>(.*?)</script>", text)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text
    assert "script-src" not in document("t", "<p>b</p>")
    assert "default-src 'none'" in text


def test_numbers_stand_to_the_right_where_some_are_missing():
    text = table("t", ("a", "b", "c"), [("x", "+1", "\u2013"), ("2", "\u2013", "\u2013")])
    cells = Cells(text)
    assert cells.rows == [["a", "b", "c"], ["x", "+1", "\u2013"], ["2", "\u2013", "\u2013"]]
    assert cells.classes == [None, "number", None] * 3
