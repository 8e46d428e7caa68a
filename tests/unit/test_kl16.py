"""The KL-16 autoencoder as a tokenizer: the files it accepts, what it stores, what it decodes."""

import hashlib
import os

import numpy as np
import pytest
import torch

from tests.conftest import kl16_shapes
from xar_scale.errors import ConfigError, DataError, UsageError
from xar_scale.tokenizers import create_tokenizer
from xar_scale.tokenizers.kl16 import KL16Tokenizer


def photos(count: int, height: int = 64, width: int = 64, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, channels, height, width), dtype=np.uint8)


def latents(count: int) -> torch.Tensor:
    return torch.randn(count, 16, 4, 4, generator=torch.Generator().manual_seed(count))


def small_state() -> dict[str, torch.Tensor]:
    """A state dict with the published names and shapes that takes no memory: every entry is one zero, repeated."""
    return {name: torch.zeros(1).expand(shape) for name, shape in kl16_shapes().items()}


def write(path, values) -> str:
    torch.save(values, path)
    return str(path)


# files


def test_a_set_made_with_other_weights_is_refused_with_both_hashes_and_the_path(kl16, kl16_weights):
    assert kl16.settings == {"sha256": hashlib.sha256(kl16_weights.read_bytes()).hexdigest()}
    description = {"name": kl16.name, **kl16.settings}
    again = create_tokenizer(description, kl16_weights)
    assert isinstance(again, KL16Tokenizer) and again.settings == kl16.settings
    with pytest.raises(DataError) as caught:
        create_tokenizer(description | {"sha256": "f" * 64}, kl16_weights)
    said = str(caught.value)
    assert str(kl16_weights) in said and kl16.sha256[:12] in said and "f" * 12 in said and len(said.splitlines()) == 1


@pytest.mark.parametrize("settings", [{}, {"sha256": None}, {"sha256": ""}])
def test_a_set_that_does_not_say_which_weights_made_it_is_refused(settings, tmp_path):
    path = write(tmp_path / "kl16.ckpt", {"model": small_state()})
    with pytest.raises(DataError, match="does not record which kl16 weights made it: its tokenizer has no sha256"):
        create_tokenizer({"name": "kl16", **settings}, path)


def test_weights_that_are_not_there(tmp_path):
    for path in (tmp_path / "nowhere.ckpt", tmp_path):
        with pytest.raises(UsageError, match=f"no weights at {path}"):
            KL16Tokenizer(path)


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
@pytest.mark.parametrize("zipped", [True, False])
def test_torn_files_are_refused_by_path(tmp_path, keep, zipped):
    path = tmp_path / "kl16.ckpt"
    torch.save({"model": small_state()}, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with pytest.raises(DataError, match=f"{path} is not a plain weights file: torn, or it contains objects"):
        KL16Tokenizer(path)


class MakesAFolder:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_objects_in_a_file_are_not_unpickled(tmp_path, zipped):
    path = tmp_path / "kl16.ckpt"
    values = {"model": small_state(), "extra": MakesAFolder(tmp_path / "made")}
    torch.save(values, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(DataError, match=f"{path} is not a plain weights file: .* contains objects, which are not unpickled"):
        KL16Tokenizer(path)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("values", [{"state_dict": {}}, {"model": 3}, [1], torch.zeros(1)])
def test_files_of_another_make_are_refused_by_path(tmp_path, values):
    path = write(tmp_path / "kl16.ckpt", values)
    with pytest.raises(DataError, match=f"{path} holds no state dict under 'model'"):
        KL16Tokenizer(path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"quant_conv.bias": None}, "lack 1 entries, first quant_conv.bias"),
        ({"encoder.extra": torch.zeros(1)}, "hold 1 unknown entries, first encoder.extra"),
        ({"lossy.weight": torch.zeros(1)}, "hold 1 unknown entries, first lossy.weight"),
        ({7: torch.zeros(1)}, "hold 1 unknown entries, first 7"),
        ({"quant_conv.bias": torch.zeros(31)}, r"quant_conv.bias is \(31,\), the network has \(32,\)"),
        ({"encoder.mid.attn_1.q.weight": torch.zeros(512, 512)}, r"\(512, 512\), the network has \(512, 512, 1, 1\)"),
        ({"decoder.conv_in.weight": torch.zeros(512, 16, 1, 9)}, r"\(512, 16, 1, 9\), the network has \(512, 16, 3, 3\)"),
        ({"quant_conv.bias": 3.0}, r"quant_conv.bias is float, the network has \(32,\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(tmp_path, change, says):
    state = {name: value for name, value in {**small_state(), **change}.items() if value is not None}
    with pytest.raises(DataError, match=says):
        KL16Tokenizer(write(tmp_path / "kl16.ckpt", {"model": state}))


def test_what_the_training_loss_held_is_left_out_and_weights_are_float32(tmp_path):
    state = {name: tensor.half() for name, tensor in small_state().items()}
    state |= {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.zeros(64, 3, 4, 4)}
    network = KL16Tokenizer(write(tmp_path / "kl16.ckpt", {"model": state})).network
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in network.parameters())


# images


def test_stored_are_mean_and_log_variance_of_levels_as_minus_1_to_1(kl16):
    images = photos(2, 32, 48)
    stored = kl16.encode(images)
    assert stored.shape == (2, 32, 2, 3) and stored.dtype == np.float16 and kl16.latent_scale == 0.2325
    moments = kl16.moments(torch.from_numpy(images) / 127.5 - 1)
    assert moments.dtype == torch.float32 and moments.abs().max() < 20  # so that nothing is clamped here
    np.testing.assert_allclose(stored, moments.numpy(), rtol=1e-3, atol=1e-5)


def encode_to(kl16, monkeypatch, channel: int, value: float) -> np.ndarray:
    """What is stored for two images if the network returns moments of 1 and, for the second, ``value`` in one channel."""
    moments = torch.ones(2, 32, 4, 4)
    moments[1, channel] = value
    monkeypatch.setattr(kl16, "moments", lambda images: moments)
    return kl16.encode(photos(2))


@pytest.mark.parametrize(
    ("channel", "value", "stored"), [(16, 1e9, 20), (31, np.inf, 20), (16, -1e9, -30), (16, -29, -29), (15, 1000, 1000)]
)
def test_the_log_variance_is_stored_clamped_and_the_mean_as_it_is(kl16, monkeypatch, channel, value, stored):
    moments = encode_to(kl16, monkeypatch, channel, value)
    assert (moments[1, channel] == stored).all()
    assert (np.delete(moments[1], channel, axis=0) == 1).all() and (moments[0] == 1).all()


@pytest.mark.parametrize(
    ("channel", "value", "says"), [(0, 7e4, "70000"), (15, -1e9, "1e"), (3, np.inf, "inf"), (31, np.nan, "nan")]
)
def test_values_beyond_float16_are_refused(kl16, monkeypatch, channel, value, says):
    with pytest.raises(DataError, match=f"image 1 of 2: its moments reach {says}.*, which float16 cannot hold"):
        encode_to(kl16, monkeypatch, channel, value)


def test_decoded_levels_are_rounded_and_clipped_as_published(kl16):
    latent = 3 * latents(2)
    pictures = kl16.decode(latent)
    assert pictures.shape == (2, 3, 64, 64) and pictures.dtype == np.uint8
    values = (kl16.reconstruct(latent).numpy() + 1) / 2
    assert values.min() < 0 and values.max() > 1
    assert np.array_equal(pictures, np.round(np.clip(values * 255, 0, 255)).astype(np.uint8))


def test_an_image_does_not_depend_on_its_batch_and_one_is_worked_on_at_a_time(kl16):
    images, latent, batches = photos(3), latents(3), set()
    network = kl16.network
    watches = [
        part.register_forward_hook(lambda *call: batches.add(len(call[-1]))) for part in (network.encoder, network.decoder)
    ]
    try:
        moments, pictures = kl16.moments(torch.from_numpy(images) / 127.5 - 1), kl16.reconstruct(latent)
        stored, decoded = kl16.encode(images), kl16.decode(latent)
        for n in range(3):
            assert torch.equal(moments[n : n + 1], kl16.moments(torch.from_numpy(images[n : n + 1]) / 127.5 - 1))
            assert torch.equal(pictures[n : n + 1], kl16.reconstruct(latent[n : n + 1]))
            assert np.array_equal(stored[n : n + 1], kl16.encode(images[n : n + 1]))
            assert np.array_equal(decoded[n : n + 1], kl16.decode(latent[n : n + 1]))
    finally:
        for watch in watches:
            watch.remove()
    assert batches == {1}


@pytest.mark.parametrize(("channels", "height", "width"), [(3, 64, 60), (3, 63, 64), (1, 64, 64), (4, 64, 64)])
def test_images_that_do_not_fit_are_refused_with_both_sizes(kl16, channels, height, width):
    says = f"images of {channels} channels and {height}x{width} pixels do not fit the kl16 tokenizer's 3 channels and 16x16"
    with pytest.raises(ConfigError, match=says):
        kl16.encode(photos(1, height, width, channels))


def test_latents_of_other_channels_are_refused(kl16):
    with pytest.raises(ConfigError, match="latents of 4 channels do not fit the kl16 tokenizer's 16"):
        kl16.decode(torch.zeros(1, 4, 4, 4))


def test_the_work_is_done_on_the_tokenizers_device(tmp_path):
    tokenizer = KL16Tokenizer(write(tmp_path / "kl16.ckpt", {"model": small_state()}), "meta")
    assert tokenizer.moments(torch.zeros(1, 3, 32, 32)).device.type == "meta"
    assert tokenizer.reconstruct(torch.zeros(1, 16, 2, 2, dtype=torch.float64)).device.type == "meta"
