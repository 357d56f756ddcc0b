from html.parser import HTMLParser

import pytest

from sparsemem.study.explain_page import page, printable, tables, verdict

HOSTILE = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>&amp;"


def slot(update="1", fact="Who owns Zed? Ana", document_frequency=3):
    return {
        "pool": "layer_1", "slot": 7, "share": 0.1, "document_frequency": document_frequency,
        "update": update, "fact": fact,
    }  # fmt: skip


def token(text, slots=(), agreement=0.5, fires=True):
    return {
        "text": text, "fires": fires, "agreement": agreement, "num_reads": 8, "num_written": len(slots),
        "slots": list(slots),
    }  # fmt: skip


def result(text="Zed met Ana", message="monday", fact="Who owns Zed? Ana"):
    return {
        "text": text,
        "fires": True,
        "tokens": [
            token(text, [slot(fact=fact), slot("2", None, 9), slot(fact=fact, document_frequency=5)]),
            token(" met", [slot()], fires=False),
            token("\n", [slot(None, None)]),
        ],
        "num_documents": 20,
        "updates": [
            {"update": "1", "message": message, "num_reads": 2, "facts": [{"fact": fact, "num_reads": 2}]}
            | {"kl": 0.25, "log_probs_without": [-2.0]},
            {"update": "2", "message": "", "num_reads": 1, "facts": []},
        ],
        "next": [{"token": text, "log_prob": -1.0}],
        "log_probs_without_all": [-3.0],
        "kl_all": 0.5,
        "num_passes": 3,
    }


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found, self.attributes, self.text, self.open = set(), set(), "", []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.found.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_hostile_text_is_text_wherever_it_stands():
    harmless, hostile = Tags(page(result())), Tags(page(result(HOSTILE, HOSTILE, HOSTILE)))
    assert hostile.found == harmless.found
    assert "script" not in hostile.found
    assert hostile.attributes == harmless.attributes
    # Title, text, token, fact of the token and of the update, message, next token.
    assert hostile.text.count(HOSTILE) == 7


def test_a_page_fetches_nothing_and_knows_the_dark():
    text = page(result())
    assert "http://" not in text
    assert "https://" not in text
    assert {"src", "href", "onclick"}.isdisjoint(Tags(text).attributes)
    assert "prefers-color-scheme: dark" in text
    assert "default-src 'none'" in text


def test_tokens_that_fire_are_marked_with_their_update():
    text = page(result())
    assert text.count("<mark") == 2
    assert ">Zed met Ana</mark><sup>1</sup>" in text
    assert "</mark> met<mark" in text.replace("<sup>1</sup>", "")


def test_tables_say_what_was_found():
    tokens, updates, following = tables(result())
    assert tokens[2] == [
        ("Zed met Ana", "0.50", "3 of 8", "5 of 20, at most 9", "1", "Who owns Zed? Ana"),
        ("\u21b5", "0.50", "1 of 8", "3 of 20, at most 3", "before all updates", "unknown"),
    ]
    assert updates[2] == [
        ("1", "monday", "2", "0.25 nats", "Who owns Zed? Ana (2)"),
        ("2", "", "1", "not measured", "unknown"),
    ]
    assert following[1:] == (
        ("token", "now", "without all", "without 1"),
        [("Zed met Ana", "36.79%", "4.98%", "13.53%")],
    )


@pytest.mark.parametrize("fires", [True, False])
def test_the_verdict_says_whether_anything_fires(fires):
    said = verdict({**result(), "fires": fires})
    assert ("Nothing learned fires here: 5 of 24 reads" in said) != fires
    assert "0.5 nats" in said


def test_controls_are_shown():
    assert printable("a\n\x1b[31m\u00e9") == "a\u21b5\\x1b[31m\u00e9"
