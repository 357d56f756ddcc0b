"""The scripts of experiments/ as modules, which import each other by their bare names."""

import importlib
import importlib.util
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    return importlib.import_module


@pytest.fixture
def measure_of(monkeypatch):
    """The script measure.py in a folder of experiments/: several have one."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))

    def load(name):
        path = EXPERIMENTS / name / "measure.py"
        spec = importlib.util.spec_from_file_location(f"measure_{name}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load
