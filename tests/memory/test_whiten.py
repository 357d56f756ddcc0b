import torch
from torch.nn.functional import normalize

from sparsemem.memory.whiten import geometric_median, scatter, whitening


def test_whitened_points_lie_in_all_directions_alike_around_zero():
    generator = torch.Generator().manual_seed(0)
    points = 5 + torch.randn(4000, 6, generator=generator) @ torch.randn(6, 6, generator=generator)
    weight, bias = whitening(points, 4)
    assert weight.shape == (4, 6)
    directions = normalize(points @ weight.T + bias, dim=1)
    torch.testing.assert_close(directions.mean(dim=0), torch.zeros(4), rtol=0, atol=0.02)
    torch.testing.assert_close(4 * directions.T @ directions / 4000, torch.eye(4), rtol=0, atol=0.05)


def test_from_their_geometric_median_the_directions_of_points_have_a_mean_of_zero():
    points = torch.randn(200, 4, generator=torch.Generator().manual_seed(0)).exp()
    directions = normalize(points - geometric_median(points), dim=1)
    torch.testing.assert_close(directions.mean(dim=0), torch.zeros(4), rtol=0, atol=1e-4)


def test_whitened_by_their_scatter_points_lie_in_all_directions_alike():
    generator = torch.Generator().manual_seed(0)
    far = torch.randn(2000, 1, generator=generator).exp() ** 2
    points = far * torch.randn(2000, 4, generator=generator) @ torch.randn(4, 4, generator=generator)
    values, vectors = torch.linalg.eigh(scatter(points, shrinkage=0.0))
    directions = normalize(points @ vectors / values.sqrt(), dim=1)
    torch.testing.assert_close(4 * directions.T @ directions / 2000, torch.eye(4), rtol=0, atol=0.01)


def test_with_fewer_points_than_dimensions_a_scatter_has_an_inverse():
    points = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    found = scatter(points)
    assert torch.linalg.eigvalsh(found).min() > 0.01
    torch.testing.assert_close(found.trace(), torch.tensor(8.0))
