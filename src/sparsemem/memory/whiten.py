"""Whitening of directions: a map after which points lie in all directions alike, however far out.

Shape letters: N points, D width, K dimensions that are kept.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize


def whitening(points_ND: Tensor, num_dims: int) -> tuple[Tensor, Tensor]:
    """Find the map after which the directions of points have a mean of zero and no preference.

    Args:
        points_ND: Shape (points, width).
        num_dims: Dimensions to keep, those in which the points vary most.

    Returns:
        Weight, shape (num_dims, width), and bias, shape (num_dims,).
    """
    mean_D = points_ND.mean(dim=0)
    values_D, vectors_DD = torch.linalg.eigh(torch.cov(points_ND.T))
    scaled_DD = vectors_DD / (values_D.clamp(min=0) + 0.3 * values_D.mean()).sqrt()
    weight_KD = scaled_DD[:, -num_dims:].T
    points_NK = (points_ND - mean_D) @ weight_KD.T
    median_K = geometric_median(points_NK)
    root_KK = inverse_root(scatter(points_NK - median_K))
    weight_KD = (root_KK @ weight_KD).contiguous()
    return weight_KD, -weight_KD @ mean_D - root_KK @ median_K


def scatter(points_NK: Tensor, shrinkage: float = 0.1, num_iterations: int = 10) -> Tensor:
    """Find how directions of points scatter; whitened by it, they point in all directions alike.

    Unlike a covariance it does not depend on how far points lie out. Source: Tyler 1987, "A
    distribution-free M-estimator of multivariate scatter", shrunk towards the identity as in Chen, Wiesel
    and Hero 2011 (arXiv:1009.5331).

    Args:
        points_NK: Shape (points, dimensions), centred.
        shrinkage: Weight of the identity, 0 to 1.
        num_iterations: Steps of the fixed-point iteration.

    Returns:
        Shape (dimensions, dimensions), its trace the number of dimensions.
    """
    directions_NK = normalize(points_NK, dim=1)
    num, dim = points_NK.shape
    identity_KK = torch.eye(dim, dtype=points_NK.dtype, device=points_NK.device)
    scatter_KK = identity_KK
    for _ in range(num_iterations):
        lengths_N1 = (directions_NK @ inverse_root(scatter_KK)).square().sum(dim=1, keepdim=True)
        scatter_KK = dim / num * (directions_NK / lengths_N1.clamp(min=1e-12)).T @ directions_NK
        scatter_KK = (1 - shrinkage) * scatter_KK + shrinkage * identity_KK
        scatter_KK = scatter_KK * dim / scatter_KK.trace()
    return scatter_KK


def geometric_median(points_NK: Tensor, num_iterations: int = 50) -> Tensor:
    """Find from where the directions of some points have a mean of zero.

    Source: Weiszfeld 1937, "Sur le point pour lequel la somme des distances de n points donnés est minimum".

    Args:
        points_NK: Shape (points, dimensions).
        num_iterations: Steps of the iteration.

    Returns:
        Shape (dimensions,).
    """
    median_K: Tensor = points_NK.mean(dim=0)
    for _ in range(num_iterations):
        nearness_N1 = 1 / (points_NK - median_K).norm(dim=1, keepdim=True).clamp(min=1e-6)
        median_K = (nearness_N1 * points_NK).sum(dim=0) / nearness_N1.sum()
    return median_K


def inverse_root(matrix_DD: Tensor) -> Tensor:
    """Return the inverse of the symmetric root of a positive definite matrix."""
    values_D, vectors_DD = torch.linalg.eigh(matrix_DD)
    root_DD: Tensor = (vectors_DD * values_D.clamp(min=1e-12).rsqrt()) @ vectors_DD.T
    return root_DD
