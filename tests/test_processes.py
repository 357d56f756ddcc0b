"""Two processes on the CPU learn what one learns; started by torchrun, once for all tests here."""

import copy
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from sparsemem import distributed
from sparsemem.cli import app, learn
from sparsemem.config import FinetuneConfig, MemoryConfig
from sparsemem.data import Fact
from sparsemem.errors import ConfigError, DataError, ProcessError
from sparsemem.evaluation.evaluate import recall
from sparsemem.files import write_jsonl
from sparsemem.memory.attach import attach_memory
from sparsemem.memory.checkpoint import save
from sparsemem.memory.fit_keys import fit_keys
from sparsemem.memory.shard import place_of_part, shard
from sparsemem.slots.usage import USAGE_FILE, count_usage, save_usage
from sparsemem.store.history import DeltaStore
from sparsemem.study import session
from sparsemem.training.finetune import finetune

# No prompt formats: their five examples are four fifths of the time and change nothing here.
USAGE_OPTIONS = {"num_documents": 30, "prompt_formats": False}
TOLERANCE = 1e-5
"""Of rows that are near 1: sums are taken in another order, and other lengths are padded together."""

CONFIG = FinetuneConfig(num_epochs=3, top_t=8, learning_rate=0.05, facts_per_batch=2, max_length=128)
PAPER = {"tie_rows": False, "anchor": "all", "weighted_reads": False}
DENSE_RATE = {"learning_rate": 1e-3, "optimizer": "sgd"}
RUNS = {
    "tied": ({"layers": (1,)}, {}),
    "paper": (
        {"layers": (1,), "relation_dim": 0},
        {**PAPER, "gradient_accumulation_steps": 2, "facts_per_batch": 4},
    ),
    "nothing for one": ({"layers": (1,)}, {"facts_per_batch": 1, "wordings_per_step": 1, "held_per_step": 0}),
    "guarded": ({"layers": (1,)}, {"penalty": "kl", "replay_fraction": 0.3, "optimizer": "sgd"}),
    "reads move": ({"layers": (0, 2), "shared_pool": True}, {"optimizer": "sgd", "stream": True}),
    "full": ({"layers": (1,)}, {"method": "full", "penalty": "ewc", **DENSE_RATE}),
    "lora": ({"layers": (1,)}, {"method": "lora", "peft": {"r": 2}, **DENSE_RATE}),
    "spread": ({"layers": (1,)}, {"num_own_paraphrases": 1}),
    "spread, nothing for one": (
        {"layers": (1,)},
        {"facts_per_batch": 1, "wordings_per_step": 1, "held_per_step": 0, "prefix_cache_bytes": 0},
    ),
    "spread, reads move": ({"layers": (0, 2), "shared_pool": True}, {"gradient_accumulation_steps": 2}),
    "spread, in its place": ({"layers": (1,), "placement": "replace"}, {"facts_per_batch": 3}),
}
FACTS = [
    Fact(question="Who owns Zed?", answer="Ana", subject="Zed", paraphrases=("Zed belongs to Ana.",)),
    Fact(statement="Quz is made of tin.", answer="tin", subject="Quz"),
    Fact(question="Where is Xix?", answer="in Oslo", paraphrases=("Xix lies in Oslo.",)),
    Fact(statement="Jov left.", subject="Jov"),
]


def run(name, models, tokenizer, texts):
    """Train a copy of a model; returns what is to be the same in every process, and what was exchanged."""
    place, options = RUNS[name]
    model, usage = copy.deepcopy(models[tuple(place.items())])
    if name.startswith("spread") and distributed.world_size() > 1:
        shard(model)
    distributed.TRAFFIC.clear()
    config = dataclasses.replace(CONFIG, **options)
    evaluate = lambda model: (os.getpid(), recall(model, tokenizer, FACTS, "qa", 4).answers)
    result = finetune(model, tokenizer, FACTS, usage, config, background=texts, evaluate=evaluate)
    found = {"losses": torch.tensor(result.losses), "evaluations": result.evaluations}
    found |= {"traffic": dict(distributed.TRAFFIC), "num_trained": result.num_trained}
    if result.delta is None:
        weights = {key: value for key, value in result.model.named_parameters() if value.requires_grad}
        return found | {"rows": {key: value.detach() for key, value in weights.items()}, "slots": {}}
    changes = result.delta.changes
    found["slots"] = {pool: change.slot_ids.tolist() for pool, change in changes.items()}
    return found | {"rows": {pool: change.after for pool, change in changes.items()}}


def arrive(mark):
    """Leave a mark, and count those that were there."""
    num_before = len([*mark.parent.glob("was here *")])
    mark.touch()
    return num_before


REFUSED = {"method": "full", "penalty": "kl", "replay_fraction": 0.5, "mixed_precision": "bf16"}


def spread_in_bfloat16(models, tokenizer, texts):
    """What is refused for a model that is spread, how much of it is here, and whether it learns."""
    model, usage = copy.deepcopy(models[("layers", (1,)),])
    model.bfloat16()
    num_before = sum(parameter.numel() for parameter in model.parameters())
    shard(model)
    tries = [
        lambda: count_usage(model, tokenizer, texts, **USAGE_OPTIONS),
        lambda: fit_keys(model, tokenizer, texts),
        lambda: save(model, "nowhere"),
    ]
    for name, value in REFUSED.items():
        config = dataclasses.replace(CONFIG, **{name: value})
        tries.append(lambda c=config: finetune(model, tokenizer, FACTS, usage, c, background=["a b c"]))
    messages = []
    for attempt in tries:
        try:
            attempt()
        except ConfigError as error:
            messages.append(str(error))
    losses = finetune(model, tokenizer, FACTS, usage, CONFIG).losses
    local = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    return messages, sum(parameter.numel() for parameter in local) / num_before, losses


def work(args):
    """All that is done by two processes; at the end one of them fails, and the other waits for it."""
    folder, rank = args.inputs, distributed.rank()
    models, tokenizer, texts = torch.load(folder / "inputs.pt", weights_only=False)
    ragged = torch.arange(3.0).view(3, 1)[: 3 * rank]  # none of one process
    found = {"gathered": distributed.gathered(ragged), "pid": os.getpid()}
    found["copied"] = torch.full((2,), float(rank + 1))
    distributed.copy_from_main([found["copied"]])
    found["order"] = distributed.main_first(lambda: arrive(folder / f"was here {rank}"))
    found["runs"] = {name: run(name, models, tokenizer, texts) for name in RUNS}
    model, _ = next(iter(models.values()))
    found["usage"] = count_usage(model, tokenizer, texts, **USAGE_OPTIONS)
    found["bfloat16"] = spread_in_bfloat16(models, tokenizer, texts)
    learn.learn(args)
    spread = found["spread"] = []
    session.shard = lambda model, device: spread.append(shard(model, device))
    args.fsdp = True
    learn.learn(args)
    torch.save(found, folder / f"{rank}.pt")
    if rank == 1:
        raise DataError("found by one process")
    distributed.summed(torch.ones(1))


def add_work(commands):
    """Add a command that takes what `learn` takes."""
    learn.add_learn(commands)
    parser = commands.choices["learn"]
    parser.add_argument("--inputs", type=Path)
    parser.set_defaults(run=work)


def learn_command(folder):
    options = ["--probes", "--json", "--num-epochs", "2", "--top-t", "6"]
    return [str(folder / "memory"), str(folder / "facts.jsonl"), *options]


@pytest.fixture(scope="module")
def models(tiny_tokenizer, make_tiny_model, texts):
    made = {}
    for place, _ in RUNS.values():
        config = MemoryConfig(**place, num_keys=8, num_heads=2, top_k=4, query_dim=4)
        model = make_tiny_model()
        if config.placement == "replace":
            model.lm_head.weight = model.model.embed_tokens.weight
        attach_memory(model, config)
        made[tuple(place.items())] = model, count_usage(model, tiny_tokenizer, texts, **USAGE_OPTIONS)
    return made


@pytest.fixture(scope="module")
def inputs(models, make_tiny_model, tiny_tokenizer, texts, tmp_path_factory):
    """A folder of what both processes are given."""
    folder = tmp_path_factory.mktemp("processes")
    torch.save((models, tiny_tokenizer, texts), folder / "inputs.pt")
    write_jsonl(folder / "facts.jsonl", [{"question": "Who owns Zed?", "answer": "Ana", "subject": "Zed"}])
    base = folder / "base"
    make_tiny_model().save_pretrained(base)
    tiny_tokenizer.save_pretrained(base)
    model, usage = next(iter(models.values()))
    (folder / "memory").mkdir()
    save(model, folder / "memory", str(base))
    save_usage(usage, folder / "memory" / USAGE_FILE)
    return folder


@pytest.fixture(scope="module")
def launched(inputs):
    """The launcher after its end; what the processes printed is in the folder "logs"."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--redirects", "3"]
    logs = ["--standalone", "--log-dir", str(inputs / "logs")]
    command = [*launcher, *logs, __file__, "learn", *learn_command(inputs), "--inputs", str(inputs)]
    env = os.environ | {"PYTHONWARNINGS": "ignore"}  # third parties' own, which are not the subject here
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=env)


@pytest.fixture(scope="module")
def together(launched, inputs):
    """What each of two processes found."""
    assert (inputs / "1.pt").exists(), launched.stderr
    return [torch.load(inputs / f"{rank}.pt", weights_only=False) for rank in range(2)]


def printed(inputs, rank, stream):
    (path,) = inputs.glob(f"logs/*/*/{rank}/{stream}.log")
    return path.read_text(encoding="utf-8")


def test_the_main_process_talks_and_commits_and_the_one_that_failed_says_why(together, launched, inputs):
    text = printed(inputs, 0, "stdout")
    first, end = json.JSONDecoder().raw_decode(text)
    reports = [first, json.loads(text[end:])]
    assert printed(inputs, 1, "stdout") == ""
    last_first = [(report["update"], report["commit"]) for report in reversed(reports)]
    assert last_first == [(2 - n, commit.id) for n, commit in enumerate(DeltaStore(inputs / "memory").log())]
    assert "measure after" in printed(inputs, 0, "stderr")
    assert "error" not in printed(inputs, 0, "stderr")
    assert printed(inputs, 1, "stderr") == "error: found by one process\n"
    assert launched.returncode != 0


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_the_same_slots_to_the_same_rows(together, models, tiny_tokenizer, texts, name):
    alone = run(name, models, tiny_tokenizer, texts)
    first, second = (found["runs"][name] for found in together)
    assert first["slots"] == second["slots"] == alone["slots"]
    assert first["num_trained"] == alone["num_trained"] > 0
    assert torch.equal(first["losses"], second["losses"])
    torch.testing.assert_close(first["losses"], alone["losses"], rtol=0, atol=TOLERANCE)
    for key, rows in alone["rows"].items():
        assert torch.equal(first["rows"][key], second["rows"][key])
        # Keys are the solution of equations whose sums come in another order.
        torch.testing.assert_close(first["rows"][key], rows, rtol=1e-4, atol=TOLERANCE)
    assert [found for _, (_, found) in first["evaluations"]] == [
        found for _, (_, found) in alone["evaluations"]
    ]
    assert alone["traffic"] == {}


def test_usage_is_the_same_to_the_last_read(together, models):
    expected = models[("layers", (1,)),][1]
    for found in together:
        usage = found["usage"]
        for count in ("reads", "document_frequency"):
            assert torch.equal(
                getattr(usage.pools["layer_1"], count), getattr(expected.pools["layer_1"], count)
            )
        assert torch.equal(usage.token_document_frequency, expected.token_document_frequency)
        assert (usage.num_documents, usage.num_tokens) == (expected.num_documents, expected.num_tokens)


def test_a_step_exchanges_no_more_than_its_rows_and_tied_ones_once(together):
    width, beside = 32, 2 * 8  # the loss, and what holds the model back
    paper, tied = (together[0]["runs"][name] for name in ("paper", "tied"))
    num_steps = len(paper["losses"])
    assert num_steps == CONFIG.num_epochs  # of all facts, so each step trains all slots
    (slots,) = paper["slots"].values()
    sizes_of_gathers = 3 * 2 * 8 * len(FACTS)
    expected = num_steps * (4 * width * len(slots) + beside) + sizes_of_gathers
    assert paper["traffic"]["sum"] == expected
    reads_gathered = paper["traffic"]["gather"] / 12  # slot, weight and fact
    assert reads_gathered <= 64 * len(FACTS)  # each slot of the pool once for each fact, once in all steps
    # Two facts are tied, the third has no subject, and nothing of the fourth names what it is about.
    assert tied["traffic"]["sum"] < expected


def test_exchanges(together):
    for found in together:
        assert torch.equal(found["gathered"], torch.arange(3.0).view(3, 1))
        assert torch.equal(found["copied"], torch.ones(2))
        assert {pid for _, (pid, _) in found["runs"]["tied"]["evaluations"]} == {together[0]["pid"]}
    assert together[0]["pid"] != together[1]["pid"]
    assert [found["order"] for found in together] == [0, 1]


def test_a_model_that_is_spread_lies_in_halves_and_does_nothing_but_learn(together):
    causes = ["counting usage", "fitting keys", "saving", *(f"{n}={v!r}" for n, v in REFUSED.items())]
    for found in together:
        messages, part, losses = found["bfloat16"]
        assert 0.5 < part < 0.6  # the memory is whole in each
        assert all("spread over processes" in message for message in messages)
        assert [message.split(" is ")[0].split(" needs ")[0] for message in messages] == causes
        assert losses == together[0]["bfloat16"][2]
        assert all(0 < loss < 20 for loss in losses)
        assert found["spread"] == [None]


def test_one_process_cannot_be_spread_over(models, inputs, capsys):
    model, _ = next(iter(models.values()))
    with pytest.raises(ConfigError, match="this is one; start them with torchrun"):
        shard(copy.deepcopy(model))
    assert app.main(["learn", str(inputs / "memory"), str(inputs / "facts.jsonl"), "--fsdp"]) == 2
    told = capsys.readouterr().err
    assert "this is one; start them with torchrun" in told
    assert "load" not in told


def test_the_gpu_of_another_process_is_refused(monkeypatch):
    monkeypatch.setattr("sparsemem.distributed.world_size", lambda: 2)
    monkeypatch.setattr("sparsemem.memory.shard.usable_device", torch.device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert place_of_part("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match="device='cuda:0' is the GPU of another process; use device='cuda'"):
        place_of_part("cuda:0")


def test_one_process_has_all_and_exchanges_nothing():
    assert (distributed.world_size(), distributed.rank(), distributed.is_main()) == (1, 0, True)
    assert distributed.share([1, 2, 3], first=5) == [1, 2, 3]
    tensor = torch.ones(2)
    assert distributed.summed(tensor) is distributed.gathered(tensor) is tensor
    assert distributed.summed_numbers(0.1, 2) == [0.1, 2]
    assert distributed.from_main(lambda: tensor) is distributed.main_first(lambda: tensor) is tensor


def test_a_process_without_a_gpu_of_its_own_is_told_before_it_waits_for_others(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with (
        pytest.raises(ProcessError, match="process 1 has no GPU of its own: there are 1"),
        distributed.processes(),
    ):
        pytest.fail("it joined")


if __name__ == "__main__":
    torch.set_num_threads(1)
    app.COMMANDS = (add_work,)
    app.IN_SEVERAL_PROCESSES = (work,)
    sys.exit(app.main())
