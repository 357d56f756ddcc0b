"""Mistakes, damage and interruptions: one line that says what to do, and nothing changed."""

import dataclasses
import errno
import json
import os
import shutil

import pytest
import torch
from tests.conftest import content
from transformers import AutoModelForCausalLM

import sparsemem.files
from sparsemem.cli.app import main
from sparsemem.memory.delta import SparseDelta
from sparsemem.slots.usage import USAGE_FILE, load_usage, save_usage
from sparsemem.store.history import DeltaStore
from sparsemem.training.loss import FactLoss

from .conftest import SHAPE, object_of


def error_line(err):
    """The one line that tells what went wrong, behind the lines that tell what was begun."""
    *before, last = err.strip().split("\n")
    assert last.startswith("error: ")
    assert all(line.endswith(" ...") for line in before)
    assert "Traceback" not in err
    return last


GROW = ("grow", "{folder}", "--num-keys", "12", "--background", "{inputs}/background.jsonl")
LEARN = ("learn", "{folder}", "{inputs}/facts.jsonl", "--num-epochs", "1", "--probes")
FACT = '{"statement": "So."}\n'
BAD_FACTS = {
    "a malformed row": (FACT + '{"question": ', "bad.jsonl:2: not valid JSON"),
    "a row that is no object": (FACT + "[1]", "bad.jsonl:2: a list, not an object"),
    "a fact without answer": (FACT + '{"question": "Who?"}', 'bad.jsonl:2: the question has no "answer"'),
    "a fact of nothing": (FACT + "{}", "bad.jsonl:2: a fact needs"),
    "no facts": ("", "bad.jsonl has no facts; give at least one row"),
}
MISTAKES = {
    "missing facts": (("learn", "{folder}", "{inputs}/none.jsonl"), "none.jsonl does not exist"),
    "missing folder": (("learn", "{inputs}/none", "{inputs}/facts.jsonl"), "sparsemem attach"),
    "a folder without a memory": (("ask", "{inputs}", "Who?"), "holds no memory_config.json"),
    "unknown ranking": ((*LEARN, "--ranking", "tfidf"), "ranking='tfidf' is unknown; use one of tf_idf"),
    "unknown method": ((*LEARN, "--method", "lorra"), "method='lorra' is unknown"),
    "unknown prompt": ((*LEARN, "--prompt", "poem"), "prompt='poem' is unknown"),
    "a number that is not positive": ((*LEARN, "--top-t", "0"), "top_t=0 is not positive"),
    "a peft option without value": ((*LEARN, "--method", "lora", "--peft", "r"), "write it as r=32"),
    "a probe without a name": ((*LEARN, "closed.jsonl"), "write it as name=path"),
    "a missing probe": ((*LEARN, "p=none.jsonl"), "none.jsonl does not exist"),
    "no facts and no undo": (("learn", "{folder}"), "no FACTS given"),
    "facts and undo": (("learn", "{folder}", "{inputs}/facts.jsonl", "--undo"), "--undo takes no FACTS"),
    "undo without updates": (("learn", "{folder}", "--undo"), "no update to undo"),
    "out for a memory": ((*LEARN, "--out", "{inputs}/out"), "out="),
    "without nonsense": (
        ("ask", "{folder}", "Who?", "--without", "nonsense"),
        "no update 'nonsense'; it has 0",
    ),
    **{
        f"no such device to {argv[0]}": ((*argv, "--device", "gpu9"), "device='gpu9' is not usable here")
        for argv in (
            LEARN,
            ("ask", "{folder}", "Who?"),
            ("evaluate", "{folder}", "--probes"),
            ("explain", "{folder}", "Who?"),
            ("plan", "{folder}"),
            ("stream", "{folder}", "{inputs}/facts.jsonl", "--probes"),
            (*GROW, "--out", "{inputs}/out"),
            ("diff", "{folder}", "attached", "HEAD", "--questions", "{inputs}/closed.jsonl"),
        )
    },
    "no such precision": (
        (*LEARN, "--dtype", "int3"),
        "dtype='int3' is unknown; use one of float32, bfloat16",
    ),
    "missing facts to evaluate": (("evaluate", "{folder}", "--facts", "none.jsonl"), "none.jsonl"),
}


def check_mistake(run, folder, argv, message, code=2):
    before = content(folder)
    found, out, err = run(*argv)
    line = error_line(err)
    assert message in line
    assert (found, out) == (code, "")
    assert content(folder) == before


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_changes_nothing(run, folder, inputs, name):
    argv, message = MISTAKES[name]
    argv = [arg.format(folder=folder, inputs=inputs) for arg in argv]
    check_mistake(run, folder, argv, message)
    assert not (inputs / "out").exists()


@pytest.mark.parametrize("name", BAD_FACTS)
def test_bad_facts_are_named_by_file_and_line_and_change_nothing(run, folder, inputs, name):
    text, message = BAD_FACTS[name]
    (inputs / "bad.jsonl").write_text(text, encoding="utf-8")
    check_mistake(run, folder, ["learn", folder, inputs / "bad.jsonl"], message)


@pytest.mark.parametrize("options", [["-m", "again"], ["--undo"]])
def test_a_truncated_update_is_named_and_kept(run, taught, inputs, options):
    path = object_of(taught)
    path.write_bytes(path.read_bytes()[:-5])
    argv = ["learn", taught, *options] if options == ["--undo"] else [*fill(LEARN, taught, inputs), *options]
    check_mistake(run, taught, argv, f"{path.name} is damaged")


def fill(argv, folder, inputs):
    return [arg.format(folder=folder, inputs=inputs) for arg in argv]


def truncate(name):
    def damage(folder, _tmp_path):
        (folder / name).write_bytes((folder / name).read_bytes()[:-5])

    return damage


def replace_usage(folder, _tmp_path):
    usage = load_usage(folder / USAGE_FILE)
    save_usage(dataclasses.replace(usage, keys_digest="0" * 64), folder / USAGE_FILE)


def replace_base_model(folder, tmp_path):
    header = json.loads((folder / "memory_config.json").read_text(encoding="utf-8"))
    other = shutil.copytree(header["base_model"], tmp_path / "other")
    model = AutoModelForCausalLM.from_pretrained(other)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight.add_(0.1)
    model.save_pretrained(other)
    (folder / "memory_config.json").write_text(json.dumps({**header, "base_model": str(other)}))


def remove_base_model(folder, tmp_path):
    header = json.loads((folder / "memory_config.json").read_text(encoding="utf-8"))
    gone = {**header, "base_model": str(tmp_path / "gone")}
    (folder / "memory_config.json").write_text(json.dumps(gone))


def damage_base_model(folder, tmp_path):
    header = json.loads((folder / "memory_config.json").read_text(encoding="utf-8"))
    other = shutil.copytree(header["base_model"], tmp_path / "other")
    truncate("model.safetensors")(other, tmp_path)
    (folder / "memory_config.json").write_text(json.dumps({**header, "base_model": str(other)}))


def newer_format(folder, _tmp_path):
    header = json.loads((folder / "memory_config.json").read_text(encoding="utf-8"))
    (folder / "memory_config.json").write_text(json.dumps({**header, "format_version": 99}))


DAMAGES = {
    "memory truncated": (truncate("memory.safetensors"), "memory.safetensors is damaged"),
    "usage truncated": (truncate(USAGE_FILE), f"{USAGE_FILE} is damaged or truncated"),
    "config truncated": (truncate("memory_config.json"), "memory_config.json is not valid JSON"),
    "usage of another pool": (replace_usage, "count_usage(...) again"),
    "another base model": (replace_base_model, "pass the model it was attached to"),
    "no base model": (remove_base_model, "gone is neither a local model nor one that could be fetched"),
    "a damaged base model": (damage_base_model, "other"),
    "a newer format": (newer_format, "format version 99"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_or_foreign_folder_is_named_and_left_alone(
    run, folder, inputs, tmp_path, monkeypatch, name
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    damage, message = DAMAGES[name]
    damage(folder, tmp_path)
    check_mistake(run, folder, fill(LEARN, folder, inputs), message)


ATTACH_MISTAKES = {
    "an existing folder": ({"--out": "{folder}"}, "memory exists already; choose another folder"),
    "a layer out of range": ({"--layers": "7"}, "layers=(7,), but this model has 3 blocks (0..2)"),
    "layers that are no numbers": ({"--layers": "top"}, "write --layers 4 6"),
    "a missing background": ({"--background": "{inputs}/none.txt"}, "none.txt does not exist"),
    "a background without text": ({"--background": "{inputs}/empty.txt"}, "empty.txt has no text"),
    "too little background": ({"--background": "{inputs}/short.txt"}, "too few to fit 8 sub-keys"),
    "unknown keys": ({"--keys": "magic"}, "keys='magic' is unknown; use one of random"),
    "unknown placement": ({"--placement": "beside"}, "placement='beside' is unknown"),
    "more reads than slots": ({"--top-k": "65"}, "top_k=65 exceeds the 64 slots"),
    "a width that does not fit": ({"--value-dim": "8"}, "value_dim=8"),
}


@pytest.mark.parametrize("name", ATTACH_MISTAKES)
def test_a_mistake_at_attach_makes_no_folder(run, model_folder, folder, inputs, tmp_path, name):
    (inputs / "empty.txt").touch()
    (inputs / "short.txt").write_text("So.")
    changes, message = ATTACH_MISTAKES[name]
    options = {"--background": "{inputs}/background.jsonl", "--out": "{inputs}/out"}
    options |= dict(zip(SHAPE[::2], SHAPE[1::2], strict=True)) | changes
    argv = fill([part for option in options.items() for part in option], folder, inputs)
    before = sorted(tmp_path.rglob("*"))
    check_mistake(run, folder, ["attach", model_folder, *argv], message)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_missing_model_is_named(run, folder, inputs, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for model in ("no-such-owner/no-such-model", f"{inputs}/none", f"{inputs}/none.gguf"):
        argv = ["attach", model, "--background", inputs / "background.jsonl", "--out", inputs / "out"]
        check_mistake(run, folder, argv, model)
    assert not (inputs / "out").exists()


def test_an_update_given_to_an_older_state_of_the_folder_is_refused(run, folder, inputs, monkeypatch):
    """Another process commits while this one trains."""
    of_part = FactLoss.of_part

    def commit_meanwhile(*args):
        if len(DeltaStore(folder)) == 0:
            DeltaStore(folder).commit(SparseDelta({}), "meanwhile")
        return of_part(*args)

    monkeypatch.setattr(FactLoss, "of_part", commit_meanwhile)
    code, _, err = run(*fill(LEARN, folder, inputs))
    assert code == 2
    assert "something was committed or undone meanwhile; learn again" in error_line(err)
    assert [commit.message for commit in DeltaStore(folder).log()] == ["meanwhile"]


def test_a_full_disk_at_the_commit_leaves_the_folder_as_it_was(run, folder, inputs, monkeypatch):
    def full_disk(_handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    check_mistake(run, folder, fill(LEARN, folder, inputs), "No space left on device", code=1)


def test_a_loss_that_is_not_finite_leaves_the_folder_as_it_was(run, folder, inputs, monkeypatch):
    of_part = FactLoss.of_part
    monkeypatch.setattr(FactLoss, "of_part", lambda *args: [loss * float("nan") for loss in of_part(*args)])
    check_mistake(run, folder, fill(LEARN, folder, inputs), "nothing was learned; lower", code=1)


def test_ctrl_c_leaves_the_folder_as_it_was(run, folder, inputs, monkeypatch):
    def stop(*_args):
        raise KeyboardInterrupt

    before = content(folder)
    monkeypatch.setattr(FactLoss, "of_part", stop)
    code, out, err = run(*fill(LEARN, folder, inputs))
    assert (code, out) == (130, "")
    assert "Traceback" not in err
    assert content(folder) == before


def test_ctrl_c_at_attach_makes_no_folder(run, model_folder, inputs, monkeypatch):
    def stop(*_args, **_kwargs):
        raise KeyboardInterrupt

    before = sorted(inputs.parent.rglob("*"))
    monkeypatch.setattr(sparsemem.files, "save_file", stop)
    background = inputs / "background.jsonl"
    code, *_ = run("attach", model_folder, "--background", background, "--out", inputs / "out", *SHAPE)
    assert code == 130
    assert sorted(inputs.parent.rglob("*")) == before


def test_an_error_is_never_folded(tmp_path, capsys, monkeypatch):
    """A remedy with a path in it is copied from the terminal, so no line end may be put into it."""
    monkeypatch.setenv("COLUMNS", "80")
    missing = tmp_path / ("a long name " * 10) / "facts.jsonl"
    assert main(["learn", str(missing.parent), str(missing)]) == 2
    err = capsys.readouterr().err
    assert str(missing.parent) in err
    error_line(err)
