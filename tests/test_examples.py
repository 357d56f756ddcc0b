import runpy
from pathlib import Path

import pytest

import sparsemem

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_runs_and_is_short(path, model_folder, tmp_path, texts, capsys):
    assert path.read_text(encoding="utf-8").count("\n") <= 80
    background = tmp_path / "background.txt"
    background.write_text("\n".join(texts * 20), encoding="utf-8")
    config = sparsemem.MemoryConfig(layers=(1,), num_keys=8, num_heads=2, top_k=4, query_dim=4)
    runpy.run_path(str(path))["main"](str(model_folder), str(background), config)
    assert capsys.readouterr().out
