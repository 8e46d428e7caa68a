"""The cache of keys and values."""

import torch

from tests.unit.conftest import nano_model, normal
from xar_scale.model.kv_cache import LayerCache


def test_a_cache_holds_what_was_written_last_at_each_position():
    cache = LayerCache(torch.empty(3, 1, 6, 4), torch.empty(3, 1, 6, 4))
    first, second, third = (normal(seed, 3, 1, 4, 4, dtype=torch.float32) for seed in range(3))
    keys, values = cache.update(0, first, 2 * first)
    assert torch.equal(keys, first) and torch.equal(values, 2 * first)
    keys, values = cache.update(2, second, 2 * second)
    assert torch.equal(keys, torch.cat([first[:, :, :2], second], dim=2)) and torch.equal(values, 2 * keys)
    keys, _ = cache.update(0, third[:2], third[:2])  # fewer sequences than the cache holds
    assert torch.equal(keys, third[:2]) and torch.equal(cache.keys[2, :, :2], first[2, :, :2])


def test_every_layer_has_a_cache_of_its_own():
    cache = nano_model().new_cache(3)
    assert len(cache) == 4 and len({tensor.data_ptr() for layer in cache for tensor in layer}) == 8
    assert {tensor.shape for layer in cache for tensor in layer} == {(3, 4, 16, 32)}
