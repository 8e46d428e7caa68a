"""The pixel tokenizer is exact; tokenizers are recreated from a data set's description."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xar_scale.errors import ConfigError, DataError, NonFiniteError, UsageError
from xar_scale.tokenizers import check_origin, create_tokenizer
from xar_scale.tokenizers.pixel import PixelTokenizer


@settings(deadline=None, max_examples=50)
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 4),
    patch=st.integers(1, 4),
    down=st.integers(1, 4),
    across=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_decoding_gives_back_every_pixel(batch, channels, patch, down, across, seed):
    shape = (batch, channels, patch * down, patch * across)
    images = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    tokenizer = PixelTokenizer(patch, channels)
    latents = tokenizer.encode(images)
    assert latents.dtype == np.float16 and latents.shape == (batch, channels * patch**2, down, across)
    assert latents.flags.c_contiguous
    decoded = tokenizer.decode(torch.from_numpy(latents))
    assert decoded.dtype == np.uint8
    assert np.array_equal(decoded, images)


def test_decoding_gives_back_every_grey_level():
    images = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    tokenizer = PixelTokenizer(patch=2)
    latents = tokenizer.encode(images)
    assert latents.min() == -1 and latents.max() == 1
    for dtype in (torch.float16, torch.float32, torch.float64):
        assert np.array_equal(tokenizer.decode(torch.from_numpy(latents).to(dtype)), images)
    rounded = torch.from_numpy(latents).bfloat16()  # not exact, but no worse than its own rounding
    assert np.array_equal(tokenizer.decode(rounded), tokenizer.decode(rounded.float()))


def test_a_token_is_a_patch_row_by_row():
    image = np.arange(16, dtype=np.uint8).reshape(1, 1, 4, 4)
    latents = PixelTokenizer(patch=2).encode(image)
    assert np.rint((latents[0, :, 0, 1] + 1) * 127.5).tolist() == [2, 3, 6, 7]


def test_levels_beyond_black_and_white_are_clipped():
    latents = torch.tensor([-3.0, -1.0, 1.0, 3.0]).view(1, 1, 2, 2)
    assert PixelTokenizer(patch=1).decode(latents).flatten().tolist() == [0, 0, 255, 255]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_has_no_level(value):
    latents = torch.zeros(3, 1, 2, 2)
    latents[1, 0, 1, 0] = value
    with pytest.raises(NonFiniteError, match="1 of 3 images are NaN or infinite"):
        PixelTokenizer(patch=1).decode(latents)


@pytest.mark.parametrize("shape", [(1, 1, 5, 4), (1, 1, 4, 5), (1, 3, 4, 4)])
def test_images_that_do_not_fit_are_refused_with_both_sizes(shape):
    says = f"images of {shape[1]} channels and {shape[2]}x{shape[3]} pixels do not fit .* 1 channels and 2x2 patches"
    with pytest.raises(ConfigError, match=says):
        PixelTokenizer(patch=2).encode(np.zeros(shape, np.uint8))


def test_a_tokenizer_is_made_again_from_its_name_and_settings():
    tokenizer = PixelTokenizer(patch=4, image_channels=3)
    again = create_tokenizer({"name": tokenizer.name, **tokenizer.settings})
    assert isinstance(again, PixelTokenizer) and again.settings == {"patch": 4, "image_channels": 3}


@pytest.mark.parametrize(
    ("description", "says"),
    [
        ({"name": "vq"}, "no tokenizer 'vq' with settings {}; available: pixel, kl16"),
        ({}, "no tokenizer None with settings {}; available: pixel, kl16"),
        ({"name": ["pixel"]}, r"no tokenizer \['pixel'\] with settings"),
        ({"name": "pixel", "side": 2}, "no tokenizer 'pixel' with settings {'side': 2}"),
        ({"name": "kl16", "weights": "a.ckpt"}, "no tokenizer 'kl16' with settings {'weights': 'a.ckpt'}"),
        ({"name": "kl16", "device": "cuda"}, "no tokenizer 'kl16' with settings {'device': 'cuda'}"),
    ],
)
def test_unknown_tokenizers_and_settings_are_refused_with_the_known_names(description, says):
    with pytest.raises(DataError, match=says):
        create_tokenizer(description)


def test_synthetic_latents_have_no_pictures():
    with pytest.raises(ConfigError, match="latents of data.path=synthetic are noise"):
        create_tokenizer({"name": "synthetic"})


@pytest.mark.parametrize("settings", [{"patch": 0}, {"patch": "2"}, {"patch": True}, {"patch": 2, "image_channels": 1.0}])
def test_a_pixel_tokenizer_of_nonsense_is_refused(settings):
    with pytest.raises(DataError, match="patch .* and image_channels .* must be positive integers"):
        create_tokenizer({"name": "pixel", **settings})


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_latents_are_of_the_dtype_asked_for(dtype):
    image = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    latents = PixelTokenizer(patch=2).encode(image, dtype)
    assert latents.dtype == dtype
    assert np.array_equal(PixelTokenizer(patch=2).decode(torch.from_numpy(latents)), image)


def test_weights_are_for_tokenizers_that_have_some():
    with pytest.raises(ConfigError, match=r"sample.tokenizer_weights is kl16.ckpt, but tokenizer pixel has no weights"):
        create_tokenizer({"name": "pixel", "patch": 2, "image_channels": 1}, weights="kl16.ckpt")
    with pytest.raises(ConfigError, match=r"kl16 needs its weights: set sample.tokenizer_weights to the path of kl16.ckpt"):
        create_tokenizer({"name": "kl16", "sha256": "0" * 64})


@pytest.mark.parametrize("sha256", [None, "", "...", "f" * 63, "f" * 65, "F" * 64, "g" * 64, "f" * 64 + "\n", 10**63])
def test_a_set_of_kl16_is_made_with_the_whole_hash_of_its_weights_alone(sha256):
    with pytest.raises(UsageError, match="tokenizer kl16: its weights' sha256 .* is not 64 lower-case hexadecimal digits"):
        check_origin({"name": "kl16", "sha256": sha256}, "moments", 32)


def test_a_set_of_kl16_has_its_channels_and_one_of_others_any():
    kl16 = {"name": "kl16", "sha256": "0123456789abcdef" * 4}
    for stored, made in (("latents", 16), ("moments", 32)):
        check_origin(kl16, stored, made)
        for channels in (1, 8, 17, 33, 48 - made):
            with pytest.raises(DataError, match=f"tokenizer kl16: its {stored} have {made} channels, not {channels}"):
                check_origin(kl16, stored, channels)
            check_origin({"name": "theirs"}, stored, channels)
