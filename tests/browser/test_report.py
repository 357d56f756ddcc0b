import pytest
from tests.study.test_report_page import HOSTILE, made_up

from sparsemem.study.report_page import page

pytestmark = pytest.mark.browser


@pytest.fixture
def report():
    """Three answers that differ."""
    result = made_up()
    result["answers"]["rows"] = [
        {
            **result["answers"]["rows"][0],
            "question": question,
            "right": [answer],
            "before": "?",
            "after": answer,
        }
        for question, answer in (
            ("Who owns Zed?", "Ana"),
            ("Who owns Quz?", "Bo"),
            ("Where is Rax?", "Cy town"),
        )
    ]
    return page(result)


def shown(opened):
    rows = opened.locator("#answers-table tbody tr")
    return [rows.nth(n).is_visible() for n in range(rows.count())]


@pytest.mark.parametrize("text", ["Zed", HOSTILE])
def test_it_opens_without_errors_and_fetches_nothing(open_page, text):
    opened, trouble = open_page(page(made_up(text)))
    assert opened.locator("section").count() == 8
    assert opened.title() == f"What {text} has learned"
    assert trouble == []


def test_the_policy_stops_what_escaping_would_have_missed(open_page):
    markup = page(made_up()).replace("</main>", "<script>document.title = 'run'</script></main>")
    opened, trouble = open_page(markup)
    assert opened.title() != "run"
    assert "Content Security Policy" in trouble[0]


def test_search_shows_the_answers_that_have_all_words(open_page, report):
    opened, trouble = open_page(report)
    assert shown(opened) == [True] * 3
    # By keyboard alone.
    opened.locator("#search").focus()
    opened.keyboard.type("WHO quz")
    assert shown(opened) == [False, True, False]
    assert opened.locator("#found").inner_text() == "1 of 3 shown"
    opened.locator("#search").fill("nonsense")
    assert shown(opened) == [False] * 3
    opened.locator("#search").fill("")
    assert shown(opened) == [True] * 3
    assert trouble == []


def test_a_cell_is_marked_and_named_when_pointed_at(open_page):
    opened, _ = open_page(page(made_up()))
    cell = opened.locator("rect.cell").first
    before = cell.evaluate("one => getComputedStyle(one).strokeWidth")
    cell.hover()
    assert cell.evaluate("one => getComputedStyle(one).strokeWidth") == "2px" != before
    assert "slot 7 of layer_1" in cell.locator("title").text_content()
    point = opened.locator(".point:has(title)").first
    point.hover()
    assert point.evaluate("one => getComputedStyle(one).strokeWidth") == "2px"


@pytest.mark.parametrize("width", [320, 360, 1000])
@pytest.mark.parametrize("text", ["Zed", "long" * 100])
def test_no_page_is_wider_than_its_screen(open_page, width, text):
    opened, _ = open_page(page(made_up(text)), width)
    for one in opened.locator("summary").all():
        one.click()
    assert opened.evaluate("document.documentElement.scrollWidth") <= width


def test_nothing_is_cut_on_paper(open_page):
    opened, _ = open_page(page(made_up("long words " * 10)), 720)
    opened.emulate_media(media="print")
    for one in opened.locator("details").all():
        one.evaluate("one => { one.open = true; }")
    assert opened.evaluate("document.documentElement.scrollWidth") <= 720


def test_a_reader_hears_a_table_on_a_phone_too(open_page, report):
    opened, _ = open_page(report, 360)
    table = opened.get_by_role("table", name="answers before and after all updates")
    assert table.get_by_role("row").count() == 4
    assert table.get_by_role("columnheader", name="question").count() == 1
    assert table.get_by_role("cell").count() == 18


def test_the_search_works_where_rows_are_cards(open_page, report):
    opened, _ = open_page(report, 360)
    opened.locator("#search").fill("cy")
    assert shown(opened) == [False, False, True]


def test_the_dark_is_dark_and_paper_shows_everything(open_page, report):
    def background(opened):
        return opened.evaluate("getComputedStyle(document.body).backgroundColor")

    light, dark = (open_page(report, color_scheme=scheme)[0] for scheme in ("light", "dark"))
    assert (background(light), background(dark)) == ("rgb(255, 255, 255)", "rgb(22, 22, 26)")
    light.locator("#search").fill("quz")
    light.emulate_media(media="print")
    assert shown(light) == [True] * 3
    assert not light.locator("nav").is_visible()
    light.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert light.locator("details:not([open])").count() == 0


def test_without_script_there_is_no_search_that_does_nothing(open_page, report):
    opened, _ = open_page(report, java_script_enabled=False)
    assert not opened.locator("#search").is_visible()
    assert shown(opened) == [True] * 3
