import pytest
import torch

from sparsemem.config import MemoryConfig
from sparsemem.errors import ConfigError, DataError
from sparsemem.memory.attach import attach_memory, memory_layers, observe_reads, pools
from sparsemem.memory.fit_keys import (
    background_states,
    balanced_sample,
    context_invariant_components,
    fit_keys,
    k_means,
    principal_components,
)
from sparsemem.memory.layer import MemoryLayer

METHODS = ["random", "k_means", "context_invariant"]
TOKENS = torch.randint(4, 300, (3, 20), generator=torch.Generator().manual_seed(0))

every_method = pytest.mark.parametrize("method", METHODS)
every_fit = pytest.mark.parametrize("method", METHODS[1:])


@pytest.fixture
def texts(texts):
    return texts[:24]


def memory_state(model):
    return {name: value.clone() for name, value in model.state_dict().items() if ".memory." in name}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def slots_read(model, tokens=TOKENS):
    seen = []
    observe_reads(model, lambda _layer, reads: seen.append(reads.slot_ids), input_ids=tokens)
    return seen


@every_method
def test_fitting_is_the_same_for_the_same_seed_and_another_for_another(
    attached, tiny_tokenizer, texts, method
):
    states = []
    for seed in (1, 1, 2):
        assert fit_keys(attached, tiny_tokenizer, texts, method, seed=seed) is attached
        states.append(memory_state(attached))
    assert same(states[0], states[1])
    assert not same(states[0], states[2])
    assert all(value.isfinite().all() for state in states for value in state.values())


@every_method
def test_fitting_changes_no_row_no_logit_and_nothing_of_the_base(attached, tiny_tokenizer, texts, method):
    with torch.no_grad():
        before = attached(TOKENS).logits
    base = {name: value.clone() for name, value in attached.state_dict().items() if ".memory." not in name}
    read_before = slots_read(attached)
    fit_keys(attached, tiny_tokenizer, texts, method, seed=5)
    assert pools(attached)["layer_1"].is_empty()
    with torch.no_grad():
        assert torch.equal(attached(TOKENS).logits, before)
    assert all(torch.equal(value, attached.state_dict()[name]) for name, value in base.items())
    assert not torch.equal(slots_read(attached)[0], read_before[0])


@every_method
def test_fitting_leaves_no_hook_behind(attached, tiny_tokenizer, texts, method):
    count = lambda: sum(len(module._forward_hooks) for module in attached.modules())
    before = count()
    fit_keys(attached, tiny_tokenizer, texts, method)
    with pytest.raises(DataError):
        fit_keys(attached, tiny_tokenizer, [], method)
    assert count() == before
    assert all(layer.before_read is None for layer in memory_layers(attached))


@pytest.mark.parametrize("placement", ["add", "replace"])
def test_states_are_those_that_reads_are_asked_with(tiny_model, tiny_tokenizer, texts, placement):
    config = MemoryConfig(layers=(0, 2), num_keys=8, num_heads=2, top_k=4, query_dim=4, placement=placement)
    model = attach_memory(tiny_model, config)
    layers, expected = list(memory_layers(model)), {0: [], 2: []}
    for text in texts[:9]:
        ids = torch.tensor([tiny_tokenizer(text)["input_ids"]])
        keep = lambda layer, reads: expected[layer.block_index].append(reads.hidden[0, 1:])
        observe_reads(model, keep, input_ids=ids)
    found = background_states(model, tiny_tokenizer, texts[:9], 10**6, layers, None)
    for states, seen in zip(found, expected.values(), strict=True):
        torch.testing.assert_close(states.hidden, torch.cat(seen))


def test_fitting_looks_nothing_up(attached, tiny_tokenizer, texts, monkeypatch):
    monkeypatch.setattr(MemoryLayer, "lookup", lambda *_args: pytest.fail("the old keys were looked up"))
    fit_keys(attached, tiny_tokenizer, texts)


@every_fit
def test_fitted_keys_spread_the_reads_further_than_random_ones(attached, tiny_tokenizer, texts, method):
    fit_keys(attached, tiny_tokenizer, texts, "random")
    random_count = slots_read(attached)[0].unique().numel()
    fit_keys(attached, tiny_tokenizer, texts, method)
    assert slots_read(attached)[0].unique().numel() > random_count


@every_fit
def test_fitted_keys_rank_by_distance(attached, tiny_tokenizer, texts, method):
    fit_keys(attached, tiny_tokenizer, texts, method)
    (layer,) = memory_layers(attached)
    torch.testing.assert_close(layer.key_bias, -layer.keys.square().sum(dim=-1) / 2)


@pytest.mark.parametrize("placement", ["add", "replace"])
@every_method
def test_every_layer_is_fitted(tiny_model, tiny_tokenizer, texts, method, placement):
    config = MemoryConfig(
        layers=(0, 2), num_keys=8, num_heads=2, top_k=4, query_dim=4, placement=placement, seed=9
    )
    model = attach_memory(tiny_model, config)
    before = [layer.query.weight.clone() for layer in memory_layers(model)]
    fit_keys(model, tiny_tokenizer, texts, method)
    after = [layer.query.weight for layer in memory_layers(model)]
    assert not any(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert not torch.equal(*after)


@pytest.mark.parametrize("block", [0, 1])
def test_value_scale_is_the_median_size_of_outputs_without_padding_and_first_positions(
    tiny_model, tiny_tokenizer, texts, block
):
    """Of block 1, to which what is read in either is added."""
    config = MemoryConfig(layers=(block,), num_keys=8, num_heads=2, top_k=4, query_dim=4, relation_dim=0)
    attached = attach_memory(tiny_model, config)
    texts = [texts[0], *(text[:9] for text in texts[1:8])]
    sizes = []
    feed_forward = attached.model.layers[1].mlp
    handle = feed_forward.register_forward_hook(
        lambda _module, _args, output: sizes.append(output[:, 1:].square().mean(dim=-1).flatten())
    )
    for text in texts:
        with torch.no_grad():
            attached(torch.tensor([tiny_tokenizer(text)["input_ids"]]))
    handle.remove()
    fit_keys(attached, tiny_tokenizer, texts, prompt_formats=False)
    (layer,) = memory_layers(attached)
    torch.testing.assert_close(layer.value_scale, torch.cat(sizes).median().sqrt(), rtol=1e-4, atol=1e-5)


@every_fit
def test_num_tokens_bounds_what_is_read(attached, tiny_tokenizer, texts, method):
    steps, pulled = [], []

    def counted():
        for text in texts:
            pulled.append(text)
            yield text

    fit_keys(
        attached,
        tiny_tokenizer,
        counted(),
        method,
        num_tokens=200,
        prompt_formats=False,
        on_step=lambda done, total: steps.append((done, total)),
    )
    assert steps[-1] == (200, 200)
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    assert len(pulled) < len(texts)


@every_fit
@pytest.mark.parametrize("few", [[], ["a"], ["", ""], ["abcd"]])
def test_too_few_tokens_are_a_data_error_that_changes_nothing(attached, tiny_tokenizer, method, few):
    before = memory_state(attached)
    with pytest.raises(DataError, match=r"too few to fit 8 sub-keys; give more text"):
        fit_keys(attached, tiny_tokenizer, few, method, prompt_formats=False)
    assert same(memory_state(attached), before)


@pytest.mark.parametrize(
    ("method", "text"),
    [
        ("k_means", "zzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzz"),
        ("context_invariant", "zzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzz"),
        ("context_invariant", "ZYXWVUQPONMLKJI"),
    ],
    ids=["k_means, one token", "context_invariant, one token", "context_invariant, no token twice"],
)
def test_a_background_too_uniform_to_fit_keys_is_a_data_error(attached, tiny_tokenizer, method, text):
    before = memory_state(attached)
    with pytest.raises(DataError):
        fit_keys(attached, tiny_tokenizer, [text], method, prompt_formats=False)
    assert same(memory_state(attached), before)


def test_an_unknown_method_names_the_known_ones(attached, tiny_tokenizer, texts):
    with pytest.raises(ConfigError, match="keys='pca' is unknown; use one of random, k_means, context_inv"):
        fit_keys(attached, tiny_tokenizer, texts, "pca")


@every_fit
def test_queries_wider_than_the_model_are_a_config_error_that_changes_nothing(
    tiny_model, tiny_tokenizer, texts, method
):
    config = MemoryConfig(layers=(1,), num_keys=8, num_heads=2, top_k=4, query_dim=9)
    model = attach_memory(tiny_model, config)
    before = memory_state(model)
    with pytest.raises(ConfigError, match="36 exceeds the model's width 32"):
        fit_keys(model, tiny_tokenizer, texts, method)
    assert same(memory_state(model), before)


@every_fit
def test_a_bfloat16_model_can_be_fitted(attached, tiny_tokenizer, texts, method):
    fit_keys(attached.to(torch.bfloat16), tiny_tokenizer, texts, method)
    floats = [value for value in memory_state(attached).values() if value.is_floating_point()]
    assert all(value.dtype == torch.float32 for value in floats)


def classes_with_one_noisy_direction():
    """Class means in four directions, and strong context noise along a fifth."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.arange(40).repeat_interleave(25)
    means = torch.zeros(40, 5)
    means[:, :4] = torch.randn(40, 4, generator=generator)
    hidden = means[classes] + 0.1 * torch.randn(1000, 5, generator=generator)
    hidden[:, 4] += 20 * torch.randn(1000, generator=generator)
    return hidden, classes


def correlations_with_the_noise(hidden, mean, components):
    projected = (hidden - mean) @ components
    return torch.corrcoef(torch.cat([projected, hidden[:, 4:]], dim=1).T)[-1, :-1].abs()


def test_context_invariant_components_put_the_direction_of_the_context_last():
    hidden, classes = classes_with_one_noisy_direction()
    mean, components = context_invariant_components(hidden, classes)
    assert components.shape == (5, 5)
    torch.testing.assert_close(mean, hidden.mean(dim=0))
    correlations = correlations_with_the_noise(hidden, mean, components)
    assert correlations[4] > 0.99
    assert (correlations[:4] < 0.1).all()


def test_principal_components_put_the_direction_of_the_context_first():
    hidden, _ = classes_with_one_noisy_direction()
    correlations = correlations_with_the_noise(hidden, *principal_components(hidden))
    assert correlations[0] > 0.99
    assert (correlations[1:] < 0.1).all()


def test_context_invariant_components_are_in_units_of_the_spread_within_a_class():
    generator = torch.Generator().manual_seed(0)
    classes = torch.arange(50).repeat_interleave(40)
    scale = torch.tensor([1.0, 3.0, 2.0])
    means = 10 * torch.randn(50, 3, generator=generator)
    hidden = means[classes] + scale * torch.randn(2000, 3, generator=generator)
    mean, components = context_invariant_components(hidden, classes)
    projected = (hidden - mean) @ components
    class_means = torch.stack([projected[classes == c].mean(dim=0) for c in range(50)])
    spread = (projected - class_means[classes]).std(dim=0)
    torch.testing.assert_close(spread, torch.ones(3), rtol=0.05, atol=0)
    strength = class_means.var(dim=0)
    assert (strength[:-1] >= strength[1:]).all()


def test_a_token_seen_once_says_nothing_about_context():
    hidden, classes = classes_with_one_noisy_direction()
    once = torch.full((1, 5), hidden.mean().item())
    _, expected = context_invariant_components(hidden, classes)
    _, found = context_invariant_components(
        torch.cat([hidden, once]), torch.cat([classes, torch.tensor([99])])
    )
    whitened = lambda components: components @ components.T
    torch.testing.assert_close(whitened(found), whitened(expected))


def test_principal_components_are_orthogonal_strongest_first_and_of_unit_mean_variance():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(500, 4, generator=generator) * torch.tensor([1.0, 5.0, 0.5, 2.0]) + 7
    mean, components = principal_components(hidden)
    variances = ((hidden - mean) @ components).square().mean(dim=0)
    assert (variances[:-1] >= variances[1:]).all()
    torch.testing.assert_close(variances.mean(), torch.tensor(1.0))
    gram = components.T @ components
    torch.testing.assert_close(gram, gram[0, 0] * torch.eye(4), rtol=1e-4, atol=1e-5)


def test_k_means_recovers_separated_clusters():
    # Lloyd's algorithm has no restarts: a start with two points of one cluster may end in a worse one.
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [50.0, 0.0], [0.0, 50.0]])
    points = centres + torch.randn(40, 3, 2, generator=generator)
    best = min(
        (k_means(points.view(-1, 2), 3, torch.Generator().manual_seed(seed)) for seed in range(8)),
        key=lambda found: torch.cdist(points.view(-1, 2), found).min(dim=1).values.sum(),
    )
    found = best[torch.cdist(centres, best).argmin(dim=1)]
    torch.testing.assert_close(found, points.mean(dim=0), rtol=1e-5, atol=1e-4)


def test_k_means_in_parts_is_lloyds_algorithm_written_down():
    points = torch.randn(1300, 3, generator=torch.Generator().manual_seed(0))
    start = torch.randperm(1300, generator=torch.Generator().manual_seed(1))[:6]
    centres = points[start]
    for _ in range(10):
        nearest = torch.cdist(points, centres).argmin(dim=1)
        centres = torch.stack([points[nearest == number].mean(dim=0) for number in range(6)])
    torch.testing.assert_close(k_means(points, 6, torch.Generator().manual_seed(1)), centres)


def test_k_means_never_makes_the_clusters_worse():
    points = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    spread = lambda steps: (
        torch.cdist(points, k_means(points, 6, torch.Generator().manual_seed(1), steps))
        .min(dim=1)
        .values.square()
        .sum()
    )
    assert spread(10) <= spread(1) <= spread(0)


def test_k_means_with_identical_points_stays_finite():
    centres = k_means(torch.ones(20, 2), 4, torch.Generator().manual_seed(0))
    torch.testing.assert_close(centres, torch.ones(4, 2))


def test_balanced_sample_keeps_at_most_four_of_each_token_and_all_rare_ones():
    classes = torch.tensor([7] * 100 + [3] * 2 + [5] * 4 + [9])
    hidden = classes.float().unsqueeze(1) + torch.linspace(0, 0.9, len(classes)).unsqueeze(1)
    kept = balanced_sample(hidden, classes, torch.Generator().manual_seed(0))
    counts = {int(c): int(n) for c, n in zip(*kept.floor().unique(return_counts=True), strict=True)}
    assert counts == {3: 2, 5: 4, 7: 4, 9: 1}
    assert kept.unique().numel() == len(kept)
