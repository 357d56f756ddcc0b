import json

import pytest


@pytest.fixture
def measure(measure_of):
    return measure_of("entities")


def test_the_answer_is_no_where_chance_does_as_well(measure):
    result = json.loads(measure.RESULT.read_text(encoding="utf-8"))
    result["selections"]["tf_idf"]["500"]["p"] = 0.2
    assert measure.sentence(result).startswith("**No: ")
