"""Power-function EMAs of the weights, and post-hoc EMAs of any width, made from a few stored ones.

After Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models" (EDM2), section 3 and appendix C.
At time t, counted in updates of the weights, an EMA averages the weights of all times u with its profile
p(u) = (gamma + 1) u^gamma / t^(gamma + 1), 0 < u <= t (section 3.1). The width of a profile is its standard deviation relative
to t, sigma_rel. It does not depend on the length of training.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

MAX_WIDTH = 12**-0.5  # the width at exponent 0: a uniform average
CUTOFF = 1e-12  # of squared norms and singular values, relative to the largest; anything below is rounding error


class Profile(NamedTuple):
    """``updates``: the time t at which the EMA was stored. ``width``: sigma_rel, 0 < width < ``MAX_WIDTH``."""

    updates: int
    width: float


class Fit(NamedTuple):
    """One factor per stored EMA; they sum to 1. ``residual``: the L2 distance of the combined profile from the wanted one,
    relative to the L2 norm of the wanted one."""

    factors: np.ndarray
    residual: float


def width(exponent: float) -> float:
    """sigma_rel of the profile with exponent gamma > -1 (section 3.1; appendix C, equation 123)."""
    return float((exponent + 1) ** 0.5 / ((exponent + 2) * (exponent + 3) ** 0.5))


def exponent(width: float) -> float:
    """gamma >= 0 of the profile of this sigma_rel: equation 123 solved, whose root is the largest of a cubic in gamma + 2."""
    inverse = width**-2
    return float(np.roots([1, 1, -inverse, inverse]).real.max()) - 2


def lerp_weight(update: int, exponent: float) -> float:
    """1 - beta of update number ``update``, counted from 1: the factor of the new weights in the EMA (section 3.1).

    beta = (1 - 1/t)^(gamma + 1). At update t, the weights of update u have the factor
    (u^(gamma + 1) - (u - 1)^(gamma + 1)) / t^(gamma + 1), which is the profile's integral from u - 1 to u. So the EMA is exact
    for weights that change only at updates.
    """
    return 1 - (1 - 1 / update) ** (exponent + 1)


def inner_products(some: Sequence[Profile], others: Sequence[Profile]) -> np.ndarray:
    """(len(some), len(others)): integrals of p_i p_j over all times, in closed form (appendix C).

    (gamma_i + 1)(gamma_j + 1) / (gamma_i + gamma_j + 1) * min(t_i, t_j)^(gamma_i + gamma_j + 1)
    / (t_i^(gamma_i + 1) t_j^(gamma_j + 1)), computed with logarithms because the powers overflow.
    """
    times_i, powers_i = (column[:, None] for column in _columns(some))
    times_j, powers_j = (column[None, :] for column in _columns(others))
    together = powers_i + powers_j - 1
    log = together * np.log(np.minimum(times_i, times_j)) - powers_i * np.log(times_i) - powers_j * np.log(times_j)
    products: np.ndarray = powers_i * powers_j / together * np.exp(log)
    return products


def _columns(profiles: Sequence[Profile]) -> tuple[np.ndarray, np.ndarray]:
    """t and gamma + 1 of each profile."""
    powers = np.array([exponent(profile.width) + 1 for profile in profiles])
    return np.array([float(profile.updates) for profile in profiles]), powers


def fit(stored: Sequence[Profile], wanted: Profile) -> Fit:
    """Return the factors that combine the ``stored`` EMAs into the profile nearest to ``wanted``: least squares (section 3.2,
    appendix C) among factors that sum to 1, because weights are far larger than their changes during the averaging.
    """
    gram = inner_products(stored, stored)
    against = inner_products(stored, [wanted])[:, 0]
    norm = inner_products([wanted], [wanted])[0, 0]
    # p_n + sum over i < n of y_i (p_i - p_n) sums to 1 whatever the y_i are
    differences = gram[:-1, :-1] - gram[:-1, -1:] - gram[-1:, :-1] + gram[-1, -1]
    toward = against[:-1] - against[-1] - gram[:-1, -1] + gram[-1, -1]
    scale = np.diag(differences).clip(min=CUTOFF * gram[-1, -1]) ** -0.5  # early profiles are tall
    solved = np.linalg.pinv(differences * np.outer(scale, scale), rcond=CUTOFF, hermitian=True) @ (toward * scale) * scale
    factors = np.append(solved, 1 - solved.sum())
    square = norm - 2 * factors @ against + factors @ gram @ factors
    return Fit(factors, float((max(square, 0.0) / norm) ** 0.5))
