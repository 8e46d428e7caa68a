"""Post-hoc EMA from a few snapshots: the mathematics, and a comparison with the weights of every step."""

import os
import resource

import numpy as np
import pytest
import torch

from tests.conftest import digits_config
from tests.processes import ROOT
from tests.unit.damage import flip_byte
from tests.unit.tiny_run import Run
from xar_scale.checkpoint.load import load_weights
from xar_scale.checkpoint.manifest import verify
from xar_scale.checkpoint.posthoc_ema import MAX_RESIDUAL, WIDTHS_TRIED, fit_to, open_snapshots, write_ema
from xar_scale.ema import POWER_KINDS, WIDTHS
from xar_scale.errors import DataError, UsageError
from xar_scale.posthoc import MAX_WIDTH, Profile, exponent, fit, inner_products, lerp_weight, width

TINY = ("train.engine=single", "model.width=16", "model.heads=2", "train.global_batch=8", "optim.ema_snapshots_every=25")


def trapezoid(values: np.ndarray, at: np.ndarray) -> float:
    return torch.trapezoid(torch.from_numpy(values), torch.from_numpy(at)).item()


def shares(sigma_rel: float, updates: int) -> torch.Tensor:
    """The factor of each update's weights in the EMA, from the definition: the profile's integral over the update."""
    power = exponent(sigma_rel) + 1
    edges = (torch.arange(updates + 1, dtype=torch.float64) / updates) ** power
    return edges.diff()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 3.0, 6.94, 16.97, 400.0])
def test_width_and_exponent_are_each_other_s_inverse(gamma):
    assert exponent(width(gamma)) == pytest.approx(gamma, rel=1e-9, abs=1e-6)


def test_the_exponents_are_the_published_ones():
    assert [round(exponent(sigma_rel), 2) for sigma_rel in (0.05, 0.10)] == [16.97, 6.94]
    assert width(0) == pytest.approx(MAX_WIDTH)


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.10, 0.25])
def test_the_profile_s_deviation_is_its_width(sigma_rel):
    """By numerical integration, for a training of length 1."""
    u = np.linspace(0, 1, 200_001)
    profile = (exponent(sigma_rel) + 1) * u ** exponent(sigma_rel)
    mass, mean = trapezoid(profile, u), trapezoid(profile * u, u)
    assert mass == pytest.approx(1, rel=1e-6)
    assert trapezoid(profile * (u - mean) ** 2, u) ** 0.5 == pytest.approx(sigma_rel, rel=1e-4)


def test_inner_products_are_the_integrals():
    some, other = Profile(70, 0.05), Profile(100, 0.2)
    u = np.linspace(0, 100, 400_001)

    def profile(of):
        power = exponent(of.width) + 1
        return np.where(u <= of.updates, power * (u / of.updates) ** (power - 1) / of.updates, 0)

    for a, b in ((some, other), (other, some), (some, some), (other, other)):
        assert inner_products([a], [b])[0, 0] == pytest.approx(trapezoid(profile(a) * profile(b), u), rel=1e-3)
    assert np.isfinite(inner_products([Profile(10**7, 0.005)], [Profile(3, 0.005)])).all()


def test_lerp_weights_give_the_profile():
    """The factor that each update ends with in an EMA updated with ``lerp_weight``."""
    left = torch.zeros(50, dtype=torch.float64)
    for update in range(1, 51):
        share = lerp_weight(update, exponent(0.1))
        left *= 1 - share
        left[update - 1] = share
    torch.testing.assert_close(left, shares(0.1, 50), rtol=1e-12, atol=1e-15)


def test_a_stored_ema_is_reproduced_and_factors_sum_to_one():
    stored = [Profile(updates, sigma_rel) for updates in (100, 200, 300) for sigma_rel in WIDTHS]
    for number, profile in enumerate(stored):
        found = fit(stored, profile)
        assert found.factors == pytest.approx(np.eye(6)[number], abs=1e-6) and found.residual < 1e-6
    other = fit(stored, Profile(300, 0.08))
    assert other.factors.sum() == pytest.approx(1, abs=1e-12) and 0 < other.residual < MAX_RESIDUAL
    twice = fit([*stored, stored[-1]], Profile(300, 0.08))  # a duplicate does no harm
    assert twice.residual == pytest.approx(other.residual, rel=1e-6)


@pytest.mark.parametrize("count", [2, 8, 32, pytest.param(128, marks=pytest.mark.long)])
def test_the_widths_in_the_docs_are_the_possible_ones(count):
    stored = [Profile(1000 * number, sigma_rel) for number in range(1, count + 1) for sigma_rel in WIDTHS]
    fits = [width for width in WIDTHS_TRIED if fit(stored, Profile(1000 * count, width)).residual <= MAX_RESIDUAL]
    row = f"| {count} | {min(fits):.3f} to {max(fits):.3f} |\n"
    assert row in (ROOT / "docs" / "checkpoints.md").read_text(), row


class Trained:
    """200 steps of a tiny model: the weights after each, and snapshots every 25."""

    def __init__(self, folder):
        self.folder, self.run = folder, Run(folder, config=digits_config(*TINY))
        self.weights = []
        for step in range(1, 201):
            self.run.train()
            self.weights.append(torch.cat([shard.master.flatten() for shard in self.run.engine.shards()]).double())
            if step % 25 == 0:
                self.run.store.save(self.run.manifest(kinds=tuple(POWER_KINDS), world=3))
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


def test_the_emas_kept_in_training_equal_the_weighted_sum_of_all_weights(trained):
    for kind, sigma_rel in POWER_KINDS.items():
        kept = torch.cat([average.flatten() for average in trained.run.ema.averages[kind]])
        torch.testing.assert_close(kept.double(), trained.true(sigma_rel), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("sigma_rel", "step", "off"),
    [(0.04, 200, 0.02), (0.07, 200, 0.005), (0.085, 150, 0.006), (0.12, 200, 0.003), (0.15, 200, 0.005)],
)
def test_a_post_hoc_ema_is_near_the_true_one(trained, tmp_path, sigma_rel, step, off):
    """From 8 snapshots, or 6. ``off``: relative to the distance of the last weights from their EMA."""
    snapshots = open_snapshots(trained.folder, step)
    found = fit_to(snapshots, sigma_rel)
    made = trained.made(write_ema(snapshots, found.factors.tolist(), sigma_rel, tmp_path / "made"))
    true = trained.true(sigma_rel, step)
    assert (made - true).norm() < off * (trained.weights[step - 1] - true).norm()
    manifest = verify(tmp_path / "made").manifest
    assert (manifest.kinds, manifest.step, manifest.sigma_rel, manifest.world) == (("ema",), step, sigma_rel, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_a_stored_width_gives_the_stored_ema(trained, tmp_path):
    snapshots = open_snapshots(trained.folder, None)
    made = write_ema(snapshots, fit_to(snapshots, 0.10).factors.tolist(), 0.10, tmp_path / "made")
    kept = torch.cat([average.flatten() for average in trained.run.ema.averages["ema-0.10"]])
    torch.testing.assert_close(trained.made(made), kept.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("sigma_rel", "step", "complaint"),
    [
        (
            0.02,
            None,
            "--std 0.02 cannot be made from 8 snapshots, updates 25 to 200: .* of 24.53%, .* of 5%;.* --std is 0.037",
        ),
        (0.25, None, "an error of 18.04%, .* --std is 0.17"),
        (0.042, 50, "an error of 5.02%, above the limit of 5%"),
        (0.15, 50, "cannot be made from 2 snapshots, updates 25 to 50"),
        (0.07, 40, "no snapshot of --step 40; available: 25, 50, 75"),
        (0.29, None, "--std 0.29 is not a width: it must lie between 0 and 0.2887"),
        (0.0, None, "--std 0 is not a width"),
    ],
)
def test_impossible_widths_are_refused_with_the_numbers(trained, sigma_rel, step, complaint):
    with pytest.raises(UsageError, match=complaint):
        fit_to(open_snapshots(trained.folder, step), sigma_rel)


def test_snapshots_that_do_not_fit_or_are_damaged_are_refused(tmp_path):
    with pytest.raises(UsageError, match="no EMA snapshots in .*/ema: .* optim.ema_snapshots_every is set"):
        open_snapshots(tmp_path, None)
    for step, more in ((1, ("model.depth_decoder=1",)), (2, ())):
        run = Run(tmp_path, config=digits_config(*TINY, *more))
        run.train(step)
        run.store.save(run.manifest(kinds=tuple(POWER_KINDS)))
        run.store.finish()
    with pytest.raises(DataError, match="snapshot .*step-00000001 belongs to another model than .*step-00000002"):
        open_snapshots(tmp_path, None)
    (tmp_path / "ema" / "step-00000001").rename(tmp_path / "ema" / "mine")
    snapshots = open_snapshots(tmp_path, None)
    flip_byte(next(snapshots[0].path.glob("*.safetensors")))
    with pytest.raises(DataError, match="step-00000002: shard-.* is corrupt"):
        write_ema(snapshots, [1.0, 0.0], 0.05, tmp_path / "made")
    with pytest.raises(UsageError, match="mine already exists"):
        write_ema(snapshots, [1.0, 0.0], 0.05, tmp_path / "ema" / "mine")
    assert not (tmp_path / "made").exists()


def test_more_files_than_a_process_usually_may_open(trained, tmp_path):
    snapshots = open_snapshots(trained.folder, None)
    usual, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 6, most))  # there are 8 files
    try:
        write_ema(snapshots, fit_to(snapshots, 0.07).factors.tolist(), 0.07, tmp_path / "made")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (usual, most))


def test_an_interrupted_write_leaves_nothing_visible_and_can_be_repeated(trained, tmp_path, monkeypatch):
    snapshots = open_snapshots(trained.folder, 25)
    with monkeypatch.context() as broken:
        broken.setattr("xar_scale.checkpoint.posthoc_ema.write_atomically", None)
        with pytest.raises(TypeError):
            write_ema(snapshots, [1.0, 0.0], 0.05, tmp_path / "made")
    assert not (tmp_path / "made").exists()
    verify(write_ema(snapshots, [1.0, 0.0], 0.05, tmp_path / "made").path)
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
