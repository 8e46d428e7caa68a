"""Averages of any length made of a few snapshots: the mathematics, and against the weights of every step."""

import numpy as np
import pytest
import torch

from tests.conftest import digits_config
from tests.unit.tiny_run import Run
from xar_scale.checkpoint import averages
from xar_scale.checkpoint.averages import LARGEST_RESIDUAL, fit_to, open_snapshots, write_average
from xar_scale.checkpoint.load import load_weights
from xar_scale.checkpoint.manifest import read_manifest, verify
from xar_scale.ema import POWER_KINDS, WIDTHS
from xar_scale.errors import DataError, UsageError
from xar_scale.posthoc import WIDEST, Profile, exponent, fit, inner_products, share_of_new, width

TINY = ("train.engine=single", "model.width=16", "model.heads=2", "train.global_batch=8", "optim.ema_snapshots_every=25")


def shares(sigma_rel: float, updates: int) -> torch.Tensor:
    """Of each update's weights in the average, straight from the definition: the profile's integral over the update."""
    power = exponent(sigma_rel) + 1
    edges = (torch.arange(updates + 1, dtype=torch.float64) / updates) ** power
    return edges.diff()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 3.0, 6.94, 16.97, 400.0])
def test_width_and_exponent_are_each_other_s_inverse(gamma):
    assert exponent(width(gamma)) == pytest.approx(gamma, rel=1e-9, abs=1e-6)


def test_the_exponents_are_the_published_ones():
    assert [round(exponent(sigma_rel), 2) for sigma_rel in (0.05, 0.10)] == [16.97, 6.94]
    assert width(0) == pytest.approx(WIDEST)


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.10, 0.25])
def test_the_profile_s_deviation_is_its_width(sigma_rel):
    """By numerical integration, over a training of length 1."""
    u = np.linspace(0, 1, 200_001)
    profile = (exponent(sigma_rel) + 1) * u ** exponent(sigma_rel)
    mass, mean = np.trapezoid(profile, u), np.trapezoid(profile * u, u)
    assert mass == pytest.approx(1, rel=1e-6)
    assert np.trapezoid(profile * (u - mean) ** 2, u) ** 0.5 == pytest.approx(sigma_rel, rel=1e-4)


def test_inner_products_are_the_integrals():
    some, other = Profile(70, 0.05), Profile(100, 0.2)
    u = np.linspace(0, 100, 400_001)

    def profile(of):
        power = exponent(of.width) + 1
        return np.where(u <= of.updates, power * (u / of.updates) ** (power - 1) / of.updates, 0)

    for a, b in ((some, other), (other, some), (some, some), (other, other)):
        assert inner_products([a], [b])[0, 0] == pytest.approx(np.trapezoid(profile(a) * profile(b), u), rel=1e-3)
    assert np.isfinite(inner_products([Profile(10**7, 0.005)], [Profile(3, 0.005)])).all()


def test_updates_give_the_profile():
    """What each update is left with of an average that is kept by ``share_of_new``."""
    left = torch.zeros(50, dtype=torch.float64)
    for update in range(1, 51):
        share = share_of_new(update, exponent(0.1))
        left *= 1 - share
        left[update - 1] = share
    torch.testing.assert_close(left, shares(0.1, 50), rtol=1e-12, atol=1e-15)


def test_a_stored_average_is_found_again_and_factors_sum_to_one():
    stored = [Profile(updates, sigma_rel) for updates in (100, 200, 300) for sigma_rel in WIDTHS]
    for number, profile in enumerate(stored):
        found = fit(stored, profile)
        assert found.factors == pytest.approx(np.eye(6)[number], abs=1e-6) and found.residual < 1e-6
    other = fit(stored, Profile(300, 0.08))
    assert other.factors.sum() == pytest.approx(1, abs=1e-12) and 0 < other.residual < LARGEST_RESIDUAL
    twice = fit([*stored, stored[-1]], Profile(300, 0.08))  # the same one two times over is no trouble
    assert twice.residual == pytest.approx(other.residual, rel=1e-6)


class Trained:
    """200 steps of a tiny model, the weights of every one, and snapshots every 25."""

    def __init__(self, folder):
        self.folder, self.run = folder, Run(folder, config=digits_config(*TINY))
        self.weights = []
        for step in range(1, 201):
            self.run.train()
            self.weights.append(torch.cat([shard.master.flatten() for shard in self.run.engine.shards()]).double())
            if step % 25 == 0:
                self.run.store.save(self.run.manifest(kinds=tuple(POWER_KINDS)))
        self.run.store.finish()
        self.names = [shard.name for shard in self.run.engine.shards()]

    def true(self, sigma_rel: float, updates: int = 200) -> torch.Tensor:
        return (shares(sigma_rel, updates)[:, None] * torch.stack(self.weights[:updates])).sum(0)

    def made(self, checkpoint) -> torch.Tensor:
        weights = load_weights(checkpoint, "ema")
        return torch.cat([weights[name].flatten() for name in self.names]).double()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return Trained(tmp_path_factory.mktemp("trained"))


def test_the_averages_kept_in_training_are_those_of_all_weights(trained):
    for kind, sigma_rel in POWER_KINDS.items():
        kept = torch.cat([average.flatten() for average in trained.run.ema.averages[kind]])
        torch.testing.assert_close(kept.double(), trained.true(sigma_rel), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("sigma_rel", "step"), [(0.04, 200), (0.07, 200), (0.085, 150), (0.12, 200), (0.15, 200)])
def test_an_average_made_of_snapshots_is_near_the_one_of_all_weights(trained, tmp_path, sigma_rel, step):
    """The error, relative to how far the last weights are from their average."""
    snapshots = open_snapshots(trained.folder, step)
    found = fit_to(snapshots, sigma_rel)
    made = trained.made(write_average(snapshots, found.factors.tolist(), sigma_rel, tmp_path / "made"))
    true = trained.true(sigma_rel, step)
    error = ((made - true).norm() / (trained.weights[step - 1] - true).norm()).item()
    print(f"sigma_rel {sigma_rel} at {step}: residual {found.residual:.2%}, error {error:.2%}")
    assert error < LIMIT


LIMIT = 0.02
