import json

import pytest


@pytest.mark.parametrize("name", ["entities", "explain"])
def test_the_answer_in_the_readme_is_that_of_the_file(measure_of, name):
    measure = measure_of(name)
    result = json.loads(measure.RESULT.read_text(encoding="utf-8"))
    readme = measure.README.read_text(encoding="utf-8")
    assert measure.with_answer(readme, result) == readme
    assert result["commit"]
    assert result["data_sha"]
