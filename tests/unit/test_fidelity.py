"""Our metrics against torch-fidelity's own pipeline and against ones computed by hand; statistics; Inception weights."""

import contextlib
import hashlib
import random
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
import torch_fidelity
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from torch import nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from tools import sweep
from xar_scale.errors import DataError, UsageError
from xar_scale.evaluate import fidelity
from xar_scale.evaluate import images as images_module
from xar_scale.evaluate.evaluation import Comparison, check_folder, sha256_of, write
from xar_scale.evaluate.fidelity import Extractor, Reference, measure, read_statistics, statistics_of
from xar_scale.evaluate.images import ImageFiles, ImagesInMemory, open_images

CPU = torch.device("cpu")
FEATURES, COUNT = 12, 300


class Seeded(FeatureExtractorBase):
    """Two random layers: a feature extractor that needs no download."""

    def __init__(self, name, features_list, **_):
        super().__init__(name, features_list)
        generator = torch.Generator().manual_seed(0)
        self.kernel = nn.Parameter(torch.randn(FEATURES, 3, 5, 5, generator=generator) / 9)
        self.head = nn.Parameter(torch.randn(10, FEATURES, generator=generator))

    @staticmethod
    def get_provided_features_list():
        return "pooled", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "logits" if metric == "isc" else "pooled"

    def forward(self, images):
        assert images.dtype == torch.uint8
        pooled = nn.functional.conv2d(images.float() / 128 - 1, self.kernel).relu().mean((2, 3))
        found = {"pooled": pooled, "logits": pooled @ self.head.T}
        return tuple(found[name] for name in self.features_list)


fidelity.register("seeded", Seeded)


def of_features(features, extractor) -> Reference:
    return Reference(statistics_of(features, extractor), features)


def pictures(seed: int, levels: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, levels, (COUNT, 3, 16, 16), dtype=np.uint8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two sets of image files."""
    made = []
    for seed, levels in ((1, 256), (2, 240)):
        folder = tmp_path_factory.mktemp(f"set{seed}")
        for number, picture in enumerate(pictures(seed, levels)):
            Image.fromarray(picture.transpose(1, 2, 0)).save(folder / f"{number:04d}.png")
        made.append(folder)
    return made


def test_every_metric_matches_torch_fidelitys_own_pipeline(folders, monkeypatch):
    monkeypatch.setattr(fidelity, "KID_SUBSET", 100)
    theirs = torch_fidelity.calculate_metrics(
        input1=str(folders[0]),
        input2=str(folders[1]),
        feature_extractor="seeded",
        fid=True,
        isc=True,
        kid=True,
        prc=True,
        kid_subset_size=100,
        cuda=False,
        verbose=False,
        cache=False,
        save_cpu_ram=True,
    )
    comparison = Comparison(str(folders[1]), "seeded", CPU)
    ours = comparison.evaluate(open_images(folders[0]), None, {})["metrics"]
    names = {
        "frechet_distance": "frechet_inception_distance",
        "classifier_score": "inception_score_mean",
        "classifier_score_std": "inception_score_std",
        "kernel_distance": "kernel_inception_distance_mean",
        "kernel_distance_std": "kernel_inception_distance_std",
        "precision": "precision",
        "recall": "recall",
    }
    assert set(ours) == set(names)  # none of them is called FID or IS
    for name, theirs_name in names.items():
        rounding = 1e-4 if "kernel" in name else 1e-6  # a matrix product in float32
        assert ours[name] == pytest.approx(theirs[theirs_name], rel=rounding, abs=1e-9), name
    assert ours["frechet_distance"] > 1e-3 and 0 < ours["precision"] < 1


def gaussians() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    mixing = torch.randn(2, FEATURES, FEATURES, generator=generator)
    drawn = torch.randn(2, 500, FEATURES, generator=generator) @ mixing
    return drawn[0], drawn[1] + 0.5


def distance_by_hand(one: np.ndarray, other: np.ndarray) -> float:
    """Frechet distance of Gaussians (1957), by the root of the product of their covariances."""
    covariances = [np.cov(values, rowvar=False) for values in (one, other)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    return ((one.mean(0) - other.mean(0)) ** 2).sum() + np.trace(sum(covariances) - 2 * root)


def test_the_distance_of_gaussians_is_the_one_computed_by_hand():
    extractor = Extractor("seeded", CPU)
    one, other = ({"pooled": values, "logits": torch.zeros(len(values), 10)} for values in gaussians())
    found = measure(one, of_features(other, extractor), extractor)["frechet_distance"]
    by_hand = distance_by_hand(*(values["pooled"].double().numpy() for values in (one, other)))
    assert found == pytest.approx(by_hand, rel=1e-5) and found > 3
    same = measure(one, of_features(one, extractor), extractor)
    assert same["frechet_distance"] == pytest.approx(0, abs=1e-4) and same["precision"] == same["recall"] == 1


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_statistics_of_either_type_are_loaded(tmp_path, dtype):
    extractor = Extractor("seeded", CPU)
    one, other = gaussians()
    features = {"pooled": one, "logits": torch.zeros(len(one), 10)}
    mu, sigma = other.double().numpy().mean(0), np.cov(other.double().numpy(), rowvar=False)
    np.savez(tmp_path / "known.npz", mu=mu.astype(dtype), sigma=sigma.astype(dtype), other=1)
    found = measure(features, Reference(read_statistics(tmp_path / "known.npz")), extractor)
    assert found["frechet_distance"] == pytest.approx(distance_by_hand(one.double().numpy(), other.double().numpy()), rel=1e-4)
    assert set(found) == {"frechet_distance", "classifier_score", "classifier_score_std"}  # no more without images


def test_invalid_statistics_are_refused(tmp_path):
    path = tmp_path / "known.npz"
    np.savez(path, mu=np.zeros(4), sigma=np.eye(3))
    with pytest.raises(DataError, match=r"mu \(4,\) and sigma \(3, 3\) are not a mean and covariance"):
        read_statistics(path)
    np.savez(path, mu=np.full(3, np.nan), sigma=np.eye(3))
    with pytest.raises(DataError, match="not a mean and covariance"):
        read_statistics(path)
    for sigma in (np.tril(np.full((3, 3), 0.5)), -np.eye(3)):  # a triangular root, and negative variances
        np.savez(path, mu=np.zeros(3), sigma=sigma)
        with pytest.raises(DataError, match="not a mean and covariance"):
            read_statistics(path)
    np.savez(path, mu=np.zeros(3, np.float16), sigma=np.eye(3))
    with pytest.raises(DataError, match=r"known.npz: mu float16, sigma float64: statistics must be float32 or float64"):
        read_statistics(path)
    np.savez(path, mean=np.zeros(3))
    with pytest.raises(DataError, match=r"known.npz has no mu and sigma"):
        read_statistics(path)
    path.write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(DataError, match=r"known.npz is not an npz of arrays, or is torn"):
        Comparison(str(path), "seeded", CPU)
    np.savez(path, mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(DataError, match=r"known.npz has 3 features, but seeded has 12"):
        Comparison(str(path), "seeded", CPU)  # before anything is generated
    with pytest.raises(UsageError, match="no reference at"):
        Comparison(str(tmp_path / "nowhere"), "seeded", CPU)


def test_a_file_with_a_published_name_must_be_that_file(tmp_path, monkeypatch):
    assert fidelity.git_sha1(b"what is up, doc?") == "bd9dbf5aae1a3862dd1526723246b20206e5fc37"  # git's own example
    path = tmp_path / "adm_in256_stats.npz"
    np.savez(path, mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(DataError, match=r"is not the published adm_in256_stats.npz: its git blob SHA-1 is .{40}, not 1da4"):
        read_statistics(path)
    monkeypatch.setitem(fidelity.PUBLISHED, path.name, fidelity.git_sha1(path.read_bytes()))
    assert read_statistics(path)["mu"].shape == (3,)


def test_missing_inception_weights_are_reported_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(fidelity, "INCEPTION_URL", "http://127.0.0.1:9/weights.pth")
    said = r"no Inception weights at .*hub.*6726825d.pth, and .* cannot be downloaded .*--inception-weights, or evaluate"
    np.savez(tmp_path / "known.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(UsageError, match=said) as told:
        Comparison(str(tmp_path / "known.npz"), fidelity.INCEPTION, CPU)
    assert "\n" not in str(told.value) and not [*(tmp_path / "hub").rglob("*.pth")]
    with pytest.raises(UsageError, match="no Inception weights at nowhere"):
        Extractor(fidelity.INCEPTION, CPU, tmp_path.__class__("nowhere"))
    with pytest.raises(UsageError, match="no feature extractor 'nosuch'; available: .*seeded"):
        Extractor("nosuch", CPU)
    with pytest.raises(UsageError, match="--inception-weights are for inception-v3-compat, not for seeded"):
        Extractor("seeded", CPU, tmp_path)


def test_inception_weights_are_checked_before_they_are_unpickled(tmp_path, monkeypatch):
    path = tmp_path / "mine.pth"
    path.write_bytes(b"a pickle that does harm")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was unpickled"))
    with pytest.raises(DataError, match=r"mine.pth is not weights-inception-2015-12-05-6726825d.pth: its SHA-256 is"):
        Extractor(fidelity.INCEPTION, CPU, path)


def test_with_inception_the_metrics_are_called_fid_and_is(tmp_path, monkeypatch):
    """The real network with random weights, so that nothing has to be downloaded."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    module = "torch_fidelity.feature_extractor_inceptionv3"
    with monkeypatch.context() as unfilled:
        unfilled.setattr(f"{module}.load_state_dict_from_url", lambda *_, **__: {})
        unfilled.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        network = FeatureExtractorInceptionV3(fidelity.INCEPTION, ["2048"])
    torch.save(network.state_dict(), tmp_path / "made.pth")
    digest = hashlib.sha256((tmp_path / "made.pth").read_bytes()).hexdigest()
    monkeypatch.setattr(fidelity, "INCEPTION_SHA256", digest)
    extractor = Extractor(fidelity.INCEPTION, CPU, tmp_path / "made.pth")
    assert extractor.sha256 == digest
    assert extractor.layers == {"fid": "2048", "isc": "logits_unbiased", "kid": "2048", "prc": "2048"}
    grey = pictures(1, 256)[:10, :1]
    features, colour = extractor.extract(grey), extractor.extract(np.repeat(grey, 3, axis=1))
    assert features["2048"].shape == (10, 2048) and torch.equal(features["2048"], colour["2048"])
    monkeypatch.setattr(torch_fidelity.metric_fid, "fid_statistics_to_metric", lambda *_: {torch_fidelity.KEY_METRIC_FID: 1.0})
    found = measure(features, of_features(features, extractor), extractor)
    assert set(found) == {"fid", "inception_score", "inception_score_std", "kid", "kid_std", "precision", "recall"}


def test_features_are_in_the_order_of_the_images():
    images = pictures(1, 256)
    extractor = Extractor("seeded", CPU)
    together, parts = extractor.extract(images), extractor.extract_all(ImagesInMemory(images))
    torch.testing.assert_close(parts["pooled"], together["pooled"])
    assert len(parts["logits"]) == COUNT


def test_image_files_are_read_and_invalid_ones_named(tmp_path, folders):
    found = open_images(folders[0])
    assert isinstance(found, ImageFiles) and (found.count, found.parts) == (300, 2)
    assert np.array_equal(np.concatenate([found.read(0), found.read(1)]), pictures(1, 256))
    (tmp_path / "deep").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    Image.new("L", (16, 16), 7).save(tmp_path / "deep" / "b.JPG", format="jpeg")
    assert open_images(tmp_path).read(0).shape == (2, 3, 16, 16)
    Image.new("RGB", (16, 8)).save(tmp_path / "deep" / "c.png")
    with pytest.raises(DataError, match=r"c.png is 16x8 pixels, a.png is 16x16: all must have the same size"):
        open_images(tmp_path).read(0)
    (tmp_path / "deep" / "c.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"cannot read image .*c.png: "):
        open_images(tmp_path).read(0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no images in"):
        open_images(tmp_path / "empty")
    with pytest.raises(UsageError, match="no images at"):
        open_images(tmp_path / "nowhere.npz")


def test_an_image_that_another_program_would_have_to_draw_is_not_opened(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png", "EPS")
    with pytest.raises(DataError, match=r"cannot read image .*a.png: cannot identify image file"):
        open_images(tmp_path)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"images": np.zeros((2, 8, 8, 3), np.uint8)}, "has no images in arr_0"),
        ({"arr_0": np.zeros((2, 3, 8, 8), np.uint8)}, r"arr_0 is uint8\(2, 3, 8, 8\), expected one or more uint8 \(H, W, 3\)"),
        ({"arr_0": np.zeros((2, 8, 8, 3), np.float32)}, "arr_0 is float32"),
        ({"arr_0": np.zeros((0, 8, 8, 3), np.uint8)}, "arr_0 is uint8"),
        ({"arr_0": np.zeros((2, 8, 8, 3), np.uint8), "arr_1": np.zeros(3)}, r"\(3,\) labels for 2 images"),
        ({"arr_0": np.array([{}], dtype=object)}, "is not an npz of arrays"),
    ],
)
def test_an_npz_without_images_is_refused(tmp_path, arrays, said):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(DataError, match=said):
        open_images(tmp_path / "x.npz")


def test_adms_batches_hold_statistics_and_images(tmp_path):
    images = pictures(2, 240)
    extractor = Extractor("seeded", CPU)
    known = {name: 2 * value for name, value in statistics_of(extractor.extract(images), extractor).items()}
    np.savez(tmp_path / "batch.npz", arr_0=images.transpose(0, 2, 3, 1), mu=known["mu"], sigma=known["sigma"])
    given = ImagesInMemory(pictures(1, 256))
    found = Comparison(str(tmp_path / "batch.npz"), "seeded", CPU).evaluate(given, None, {})["metrics"]
    by_hand = measure(extractor.extract(given.images), Reference(known), extractor)["frechet_distance"]
    assert found["frechet_distance"] == pytest.approx(by_hand, rel=1e-6) and {"precision", "kernel_distance"} <= set(found)


def test_results_of_something_else_are_not_overwritten(tmp_path, folders):
    images, named = ImagesInMemory(pictures(3, 256)[:20]), {"set": {"path": "x", "images": 20, "sha256": "1"}}
    comparison = Comparison(str(folders[1]), "seeded", CPU)
    assert comparison.name == f"{folders[1].name}-seeded" and comparison.sha256 == sha256_of(folders[1])
    result = comparison.evaluate(images, None, named)
    write(tmp_path / "numbers", result)
    check_folder(tmp_path / "nowhere", named)
    moved = {"set": named["set"] | {"path": "y"}, "reference": result["reference"] | {"path": "z"}}
    write(tmp_path / "numbers", result | moved)
    for section, change in (("set", {"sha256": "2"}), ("reference", {"sha256": ""}), ("features", {"name": "other"})):
        with pytest.raises(UsageError, match=f"evaluation.json has results of a different {section}; remove it or write else"):
            check_folder(tmp_path / "numbers", result | {section: result[section] | change})


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "[" * 99999, '{"set": {}, "reference": 1, "features": {}}', "\udcff"])
def test_numbers_that_are_torn_are_named(tmp_path, content):
    (tmp_path / "evaluation.json").write_text(content, errors="surrogateescape")
    wanted = {"set": {}, "reference": {}, "features": {}}
    torn = f"{tmp_path}/evaluation.json is torn or changed; remove it or write elsewhere"
    with pytest.raises(DataError, match=torn):
        check_folder(tmp_path, wanted)
    with pytest.raises(DataError, match=torn):
        sweep._read(SimpleNamespace(folder=tmp_path), None)


def test_a_folder_of_pictures_is_known_by_what_is_in_them(tmp_path):
    for number in range(3):
        Image.new("L", (8, 8), number).save(tmp_path / f"{number}.png")
    before = sha256_of(tmp_path)
    (tmp_path / "list.txt").write_text("0 1 2")
    assert sha256_of(tmp_path) == before
    Image.new("L", (8, 8), 7).save(tmp_path / "1.png")
    assert sha256_of(tmp_path) != before


def test_images_in_an_npz_are_read_a_part_at_a_time(tmp_path):
    images = pictures(1, 256)
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", other=np.zeros(7), arr_0=images.transpose(0, 2, 3, 1), arr_1=np.arange(COUNT))
        found = open_images(tmp_path / "x.npz")
        base = found.images
        while base.base is not None and not isinstance(base, np.memmap):
            base = base.base
        assert isinstance(base, np.memmap) == (save is np.savez)  # more than memory holds
        assert np.array_equal(np.concatenate([found.read(0), found.read(1)]), images) and found.labels[-1] == COUNT - 1
    content = (tmp_path / "x.npz").read_bytes()
    np.savez(tmp_path / "x.npz", arr_0=images.transpose(0, 2, 3, 1))
    content = (tmp_path / "x.npz").read_bytes()
    (tmp_path / "x.npz").write_bytes(content[:1000])
    with pytest.raises(DataError, match="is not an npz of arrays, or is torn"):
        open_images(tmp_path / "x.npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damage_anywhere_in_an_npz_is_a_one_line_error(tmp_path, save):
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    save(tmp_path / "x.npz", arr_0=images, arr_1=np.arange(2), mu=np.zeros(3), sigma=np.eye(3))
    content = (tmp_path / "x.npz").read_bytes()
    for bit in random.Random(0).sample(range(8 * len(content)), 300):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        (tmp_path / "x.npz").write_bytes(damaged)
        for read in (open_images, read_statistics):
            with contextlib.suppress(DataError):
                read(tmp_path / "x.npz")


def test_an_npz_that_would_exhaust_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(images_module, "EXPANDED", 1 << 20)
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive, archive.open("mu.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, {"shape": (1 << 20,), "fortran_order": False, "descr": "<f4"})
        file.write(bytes(1 << 22))
    with pytest.raises(DataError, match=r"x.npz: mu.npy would expand from [\d,]+ to 4,194,432 bytes in memory"):
        read_statistics(tmp_path / "x.npz")
    with zipfile.ZipFile(tmp_path / "y.npz", "w") as archive:
        for name in ("mu", "sigma", "arr_0"):  # numpy would allocate the 4 TB that its header claims
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array_header_1_0(file, {"shape": (1 << 40,), "fortran_order": False, "descr": "<f4"})
    for read in (open_images, read_statistics):
        with pytest.raises(DataError, match="y.npz is not an npz of arrays, or is torn"):
            read(tmp_path / "y.npz")


def test_images_too_large_for_memory_are_refused_before_they_are_read(tmp_path, monkeypatch):
    Image.new("1", (3000, 3000)).save(tmp_path / "a.png")
    monkeypatch.setattr(PngImageFile, "load", None)
    with pytest.raises(DataError, match="a.png is 3000x3000 pixels, the most is 4,194,304 in all"):
        open_images(tmp_path)


def test_one_image_is_nothing_to_compare_and_few_have_fewer_numbers(tmp_path):
    np.savez(tmp_path / "x.npz", arr_0=np.zeros((1, 8, 8, 3), np.uint8))
    with pytest.raises(UsageError, match="holds one image: metrics need at least two"):
        open_images(tmp_path / "x.npz")
    extractor = Extractor("seeded", CPU)
    few = {"pooled": torch.randn(3, FEATURES), "logits": torch.randn(3, 10)}
    many = {"pooled": torch.randn(30, FEATURES), "logits": torch.randn(30, 10)}
    assert set(measure(few, of_features(many, extractor), extractor)) == {
        "frechet_distance",
        "kernel_distance",
        "kernel_distance_std",
    }


def test_features_are_in_float32_whatever_the_process_computes_in():
    seen = []
    extractor = Extractor("seeded", CPU)
    extractor.network.register_forward_hook(
        lambda *_: seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
    )
    torch.set_float32_matmul_precision("high")
    try:
        extractor.extract(pictures(1, 256)[:2])
        assert seen == [("highest", False)] and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_distances_between_all_images_use_all_cores(monkeypatch):
    seen, torchs = [], torch.get_num_threads()
    monkeypatch.setattr(fidelity.os, "sched_getaffinity", lambda _: range(torchs + 1))
    monkeypatch.setattr(
        torch_fidelity.metric_prc,
        "prc_features_to_metric",
        lambda *_, **__: seen.append(torch.get_num_threads()) or {"precision": 0.0, "recall": 0.0},
    )
    extractor = Extractor("seeded", CPU)
    features = extractor.extract(pictures(1, 256)[:20])
    measure(features, of_features(features, extractor), extractor)
    assert seen == [torchs + 1] and torch.get_num_threads() == torchs


@pytest.mark.parametrize("mode", ["RGBA", "I;16", "CMYK"])
def test_images_that_are_not_8_bits_per_channel_are_named(tmp_path, mode):
    suffix = "jpg" if mode == "CMYK" else "png"
    for name in "ab":
        Image.new(mode, (8, 8)).save(tmp_path / f"{name}.{suffix}")
    with pytest.raises(DataError, match=rf"a.{suffix} has mode {mode}, expected 8 bits per channel without transparency"):
        open_images(tmp_path)
