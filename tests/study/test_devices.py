"""What runs on a GPU: on a real one where there is one, else on one that is pretended."""

import contextlib
import dataclasses

import pytest
import torch
from tests.study.conftest import SHAPE
from tests.study.pretend_gpu import CPU, GPU, PretendGpu, place

from sparsemem.config import LoadConfig
from sparsemem.errors import ConfigError
from sparsemem.memory.attach import pools
from sparsemem.memory.base_model import usable_device
from sparsemem.memory.read import fused_read
from sparsemem.store.history import DeltaStore
from sparsemem.store.load import load, overlaid
from sparsemem.study.ask import ask_folder
from sparsemem.study.attach import attach_to_folder
from sparsemem.study.explain import explain_folder
from sparsemem.study.grow import grow_folder
from sparsemem.study.history import diff
from sparsemem.study.learn import evaluate_folder, learn
from sparsemem.study.plan import plan_folder
from sparsemem.study.report import report_folder
from sparsemem.training.finetune import finetune

ON_GPU = LoadConfig(device="cuda")
PRETENDED = not torch.cuda.is_available()
DENSE = {"learning_rate": 1e-3, "optimizer": "adamw"}

pytestmark = pytest.mark.filterwarnings("ignore:sparsemem reads without Triton")


@pytest.fixture
def gpu():
    """A context in which there is a GPU, which has to be used; entered by tests, as fixtures do without."""
    context = PretendGpu() if PRETENDED else contextlib.nullcontext()
    yield context
    fused_read.cache_clear()
    assert not PRETENDED or context.num_moved > 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"anchor": "all", "weighted_reads": False, "optimizer": "sgd", "momentum": 0.9},
        {"ranking": "kl", "gradient_accumulation_steps": 2},
        {"ranking": "random", "penalty": "kl", "replay_fraction": 0.3, "prefix_cache_bytes": 1},
        {"method": "full", **DENSE},
        {"method": "lora", "peft": {"r": 2}, **DENSE},
    ],
    ids=["memory", "anywhere", "parts", "guarded", "full", "lora"],
)
def test_learning(gpu, folder, facts, config, background, tmp_path, options):
    (tmp_path / "asked.jsonl").write_text('{"question": "Who wrote it?", "answers": ["Eva"]}\n')
    probes = [f"asked={tmp_path / 'asked.jsonl'}", f"text={background}"]
    with gpu:
        config = dataclasses.replace(config, **options)
        report = learn(
            folder, facts, probes=probes, config=config, background=[str(background)], loading=ON_GPU
        )
    assert report["num_trained"] > 0


def test_learning_as_in_the_paper(gpu, model_folder, facts, config, background, tmp_path):
    shape = dataclasses.replace(SHAPE, relation_dim=0)
    options = {
        "tie_rows": False,
        "anchor": "all",
        "weighted_reads": False,
        "optimizer": "sgd",
        "momentum": 0.9,
    }
    out = tmp_path / "made"
    attach_to_folder(str(model_folder), [str(background)], out, shape, num_tokens=1500, num_documents=20)
    with gpu:
        report = learn(out, facts, probes=[], config=dataclasses.replace(config, **options), loading=ON_GPU)
    assert report["num_trained"] > 0


@pytest.mark.parametrize("keys", ["k_means", "random", "context_invariant"])
@pytest.mark.parametrize("shape", [SHAPE, dataclasses.replace(SHAPE, placement="replace", layers=(0, 1))])
def test_attaching(gpu, model_folder, background, tmp_path, keys, shape):
    sizes = {"num_tokens": 1500, "num_documents": 20}
    with gpu:
        attach_to_folder(
            str(model_folder), [str(background)], tmp_path / "made", shape, keys=keys, loading=ON_GPU, **sizes
        )
    assert evaluate_folder(tmp_path / "made", probes=[])["num_slots_trained"] == 0


def test_looking_at_what_was_learned(gpu, folder, facts, config, background, tmp_path):
    with gpu:
        learn(folder, facts[:1], config=config, probes=[], loading=ON_GPU)
        learn(folder, facts[1:], config=config, probes=[], loading=ON_GPU)
        assert ask_folder(folder, "Who owns Zed?", without="2", loading=ON_GPU) is not None
        assert explain_folder(folder, "Who owns Zed?", question=True, loading=ON_GPU)["tokens"]
        assert plan_folder(folder, [str(background)], loading=ON_GPU)["num_updates"] == 2
        assert report_folder(folder, loading=ON_GPU)["heatmaps"]
        (tmp_path / "asked.jsonl").write_text('{"question": "Who owns Zed?", "answers": ["Ana"]}\n')
        store = DeltaStore(folder)
        assert "answers" in diff(store, "1", "2", questions=tmp_path / "asked.jsonl", loading=ON_GPU)
        grown = grow_folder(
            folder,
            [str(background)],
            tmp_path / "grown",
            12,
            num_tokens=1500,
            num_documents=20,
            loading=ON_GPU,
        )
        assert grown["num_facts"] == 2


def test_versions_come_and_go_on_the_device(gpu, folder, facts, config):
    learn(folder, facts, config=config, probes=[])
    store = DeltaStore(folder)
    with gpu:
        model, _ = load(folder, revision="attached", device="cuda")
        assert {p.device for p in model.parameters()} == {GPU}
        (pool,) = pools(model).values()
        with overlaid(model, [store.state(store.head())]):
            assert len(pool.written_ids) > 0
            assert pool.rows.device == pool.written_ids.device == GPU
        assert len(pool.written_ids) == 0


@pytest.mark.skipif(not PRETENDED, reason="there is a GPU")
def test_the_device_pretended_refuses_what_cuda_refuses():
    with PretendGpu():
        here, there = torch.arange(3), torch.arange(3, device="cuda")
        assert (place(here), place(there), place(there.cpu())) == (CPU, GPU, CPU)
        assert place(there[here]) == place(there * torch.tensor(2)) == GPU
        for refused in (lambda: here + there, lambda: here[there], lambda: torch.isin(there, here)):
            with pytest.raises(RuntimeError, match="same device"):
                refused()
        linear = torch.nn.Linear(3, 3)  # which nobody moved
        assert place(linear.weight) == CPU
        numbers = torch.tensor(1.0), torch.tensor(1.0, device="cuda")
        for refused in (lambda: linear(there.float()), lambda: torch.stack(numbers)):
            with pytest.raises(RuntimeError, match="same device"):
                refused()
        linear.to("cuda")(there.float())
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        with pytest.raises(RuntimeError, match="generator"):
            torch.randn(3, device="cuda", generator=torch.Generator())


@pytest.mark.skipif(not PRETENDED, reason="there is a GPU")
def test_a_device_that_is_not_there_is_named_before_a_model_is_loaded(folder, monkeypatch):
    assert usable_device("auto") == torch.device("cpu")
    monkeypatch.setattr(
        "sparsemem.memory.base_model._quiet_transformers", lambda: pytest.fail("it was loaded")
    )
    for name in ("cuda", "cuda:7", "meta", "nonsense"):
        with pytest.raises(ConfigError, match=rf"device='{name}' is not usable here \(.+\); use auto or cpu"):
            load(folder, device=name)


@pytest.mark.parametrize("dtype", ["int8", "half precision", torch.int64])
def test_what_is_no_precision_of_weights_is_named(folder, dtype):
    with pytest.raises(ConfigError, match="is no precision of weights; use float32 or bfloat16"):
        load(folder, dtype=dtype)


def test_a_model_in_bfloat16_learns_rows_in_float32(folder, facts, config, monkeypatch):
    dtypes = []

    def seen(model, *args, **options):
        dtypes.append(model.get_input_embeddings().weight.dtype)
        return finetune(model, *args, **options)

    monkeypatch.setattr("sparsemem.study.measure.finetune", seen)
    report = learn(folder, facts, config=config, probes=[], loading=LoadConfig(dtype="bfloat16"))
    assert dtypes == [torch.bfloat16]
    assert report["num_slots_trained"] > 0
    store = DeltaStore(folder)
    (change,) = store.delta(store.head()).changes.values()
    assert change.after.dtype == torch.float32
    assert not torch.equal(change.after, change.after.bfloat16().float())
    evaluate_folder(folder, probes=[], loading=LoadConfig(dtype="bfloat16"))
