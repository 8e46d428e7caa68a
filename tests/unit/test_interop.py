"""Other checkpoint formats: what is recognised, how it is named, and what is refused with which message."""

import argparse
import contextlib
import io
import json
import os
import pickle
import random
import shutil
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.unit.foreign_checkpoints import SHAPES, assert_bitwise, published, random_state, values, write_zero3
from tests.unit.tiny_run import CONFIG, Run
from xar_scale.checkpoint.interop import Source, open_source
from xar_scale.checkpoint.interop.source import InMemory
from xar_scale.checkpoint.load import load_weights
from xar_scale.checkpoint.manifest import KINDS, read_manifest
from xar_scale.checkpoint.reshard.writer import verify_source
from xar_scale.errors import DataError, UsageError

STATE = random_state("model", "exp_avg", "exp_avg_sq")


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """The checkpoint of an xar-scale run after two steps."""
    run = Run(tmp_path_factory.mktemp("own"))
    run.train(2)
    return run.save()


@pytest.fixture(scope="module")
def weights(own):
    return load_weights(read_manifest(own), "model")


@pytest.fixture
def zero(tmp_path):
    write_zero3(tmp_path / "zero", STATE)
    return tmp_path / "zero"


class Evil:
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def test_an_own_checkpoint_by_its_folder_or_its_run(own):
    with open_source(own) as source, open_source(own.parent.parent) as of_run:
        assert source.path == of_run.path == own
        assert (source.step, source.updates, source.kinds) == (2, 2, KINDS)
        assert [group["weight_decay"] for group in source.groups] == [CONFIG.optim.weight_decay, 0.0]
        expected = load_weights(read_manifest(own), "exp_avg_sq")
        assert_bitwise({name: source.whole(f"exp_avg_sq/{name}") for name in expected}, expected)


def test_a_run_means_its_newest_checkpoint_whatever_its_pointer_says(own, tmp_path):
    """The pointer is written after the checkpoint and may be stale."""
    shutil.copytree(own, tmp_path / "checkpoints" / "step-00000001")
    shutil.copytree(own, tmp_path / "checkpoints" / own.name)
    (tmp_path / "checkpoints" / "latest").write_text("step-00000001\n")
    with open_source(tmp_path) as source:
        assert source.path == tmp_path / "checkpoints" / own.name


def test_any_range_of_a_vector_sharded_over_three_ranks(zero):
    with open_source(zero) as source:
        assert (source.format, source.step, source.updates) == ("DeepSpeed ZeRO-3, 3 ranks", 5, 4)
        assert source.groups == [{"lr": 0.1}]
        for key, expected in STATE.items():
            flat = expected.flatten()
            for start in range(len(flat)):
                for stop in range(start, len(flat) + 1):
                    out = torch.empty(stop - start)
                    source.read(key, start, out)
                    assert torch.equal(out, flat[start:stop])


@pytest.mark.parametrize("legacy", [False, True])
def test_published_weights_have_our_names_and_no_constants(tmp_path, weights, legacy):
    state, averages = published(weights, CONFIG.model), {name: 2 * tensor for name, tensor in weights.items()}
    path = tmp_path / "xAR.pth"
    whole = {"model": state, "model_ema": published(averages, CONFIG.model), "args": argparse.Namespace(lr=1), "epoch": 3}
    torch.save(whole, path, _use_new_zipfile_serialization=not legacy)
    expected = {f"model/{name}": tensor for name, tensor in weights.items()}
    assert_bitwise(values(path), expected | {f"ema/{name}": tensor for name, tensor in averages.items()})
    with open_source(path) as source:
        assert ("read whole" in source.format) == legacy
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    assert_bitwise(values(path), expected)
    whole_rows = state["encoder_pos_embed_learned"]
    torch.save(state | {"encoder_pos_embed_learned": torch.cat([whole_rows, whole_rows])}, path)
    with open_source(path) as source:  # the first row is not taken for the whole
        assert source.shapes["model/encoder_pos"] == (2, *weights["encoder_pos"].shape)
    del state["pred.bias"]
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(DataError, match="published weights lack 1 entries, first pred.bias"):
        open_source(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_of_any_names_in_16_or_32_bits(tmp_path, dtype):
    state = {key.partition("/")[2]: tensor.to(dtype) for key, tensor in random_state("model").items()}
    expected = {f"model/{name}": tensor.float() for name, tensor in state.items()}
    save_file(state | {"count": torch.tensor([3])}, tmp_path / "a.safetensors")
    torch.save(state | {"count": torch.tensor([3])}, tmp_path / "a.pth")
    for path in (tmp_path / "a.safetensors", tmp_path / "a.pth"):
        assert_bitwise(values(path), expected)
        with open_source(path) as source:
            source.read("model/two.weight", 5, out := torch.empty(20))
            assert torch.equal(out, expected["model/two.weight"].flatten()[5:25])


def test_dtypes_that_float32_cannot_represent_are_refused(tmp_path):
    save_file({"a": torch.zeros(2, dtype=torch.float64)}, tmp_path / "a.safetensors")
    with pytest.raises(DataError, match="a is F64; only F32, BF16, F16 are supported"):
        open_source(tmp_path / "a.safetensors")
    torch.save({"a": torch.zeros(2, dtype=torch.float64)}, tmp_path / "a.pth")
    with pytest.raises(DataError, match="a is torch.float64"):
        open_source(tmp_path / "a.pth")
    torch.save({"a": torch.zeros(2, 3).T}, tmp_path / "a.pth")
    with pytest.raises(DataError, match=r"shape \(3, 2\) is not contiguous"):
        open_source(tmp_path / "a.pth")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickled_class_is_refused_by_name_and_not_run(tmp_path, monkeypatch, legacy):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.ones(2), "evil": Evil()}, "a.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(
        DataError,
        match=r"a.pth needs .*mkdir, which unpickling would run; --trust-pickle \(in Python, trust_pickle\) allows it",
    ):
        open_source(tmp_path / "a.pth")
    assert not (tmp_path / "unpickled").exists()
    with open_source(tmp_path / "a.pth", trust_pickle=True) as source:
        assert torch.equal(source.whole("model/a"), torch.ones(2))
    assert (tmp_path / "unpickled").exists()


def test_tensors_that_were_on_a_gpu_are_read_without_one(tmp_path):
    with FakeTensorMode():
        state = {"a": torch.empty(3, device="cuda"), "b": torch.empty(2, device="cuda:1")}
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(state, tmp_path / "a.pth")
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(tmp_path / "a.pth")
    assert_bitwise(values(tmp_path / "a.pth"), {"model/a": torch.zeros(3), "model/b": torch.zeros(2)})


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_plain_pickle_is_refused(tmp_path):
    (tmp_path / "a.pth").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(DataError, match="a.pth"):
        open_source(tmp_path / "a.pth")


def test_ranks_that_are_missing_or_torn_are_named(zero):
    second = zero / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = second.read_bytes()
    second.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=f"{second.name} is torn"):
        open_source(zero)
    second.unlink()
    with pytest.raises(DataError, match=f"lacks {second.name}"):
        open_source(zero)
    second.write_bytes(content)
    (zero / "zero_pp_rank_2_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(DataError, match="was written by one of 3 ranks, but there are files of 2"):
        open_source(zero)
    second.rename(zero / "zero_pp_rank_1_mp_rank_01_optim_states.pt")
    with pytest.raises(DataError, match="model-parallel"):
        open_source(zero)


def test_rank_files_of_different_checkpoints_or_too_short_are_refused(zero, tmp_path):
    write_zero3(tmp_path / "other", STATE, world=2)
    name = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = torch.load(zero / name)
    shutil.copy(tmp_path / "other" / name, zero / name)
    with pytest.raises(DataError, match=f"{name} was written by one of 2 ranks, but there are files of 3"):
        open_source(zero)
    content["optimizer_state_dict"]["optimizer_state_dict"]["state"][0]["step"] += 1
    torch.save(content, zero / name)
    with pytest.raises(DataError, match=f"{name} is at step 5, zero_pp_rank_0_mp_rank_00_optim_states.pt at 4"):
        open_source(zero)
    content["optimizer_state_dict"]["optimizer_state_dict"]["state"][0]["step"] -= 1
    content["optimizer_state_dict"]["fp32_flat_groups"][1] = torch.zeros(11)  # of 12
    torch.save(content, zero / name)
    with pytest.raises(DataError, match=f"{name}: needs elements 1 to 12 of a tensor that has 11"):
        open_source(zero)


@pytest.mark.parametrize("key", ["frozen_param_shapes", "shared_params"])
def test_features_that_xar_does_not_have_are_refused(tmp_path, key):
    write_zero3(tmp_path / "zero", STATE, **{key: {"a": 1}})
    with pytest.raises(DataError, match=f"{key} are not supported; xAR has none"):
        open_source(tmp_path / "zero")


def test_zero_before_its_first_step_has_weights_alone(tmp_path, zero):
    for path in zero.glob("*optim*"):
        content = torch.load(path)
        content["optimizer_state_dict"]["optimizer_state_dict"]["state"] = {}
        torch.save(content, path)
    with open_source(zero) as source:
        assert (source.kinds, source.updates) == (("model",), 0)


def test_a_layout_that_is_not_deepspeeds_is_refused(zero):
    torch.save({"optimizer_state_dict": {}}, zero / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    with pytest.raises(DataError, match=r"not laid out as DeepSpeed 0.19.8 writes .* \(KeyError 'base_optimizer_state'\)"):
        open_source(zero)


def test_missing_paths_and_unknown_formats(tmp_path, own):
    with pytest.raises(UsageError, match="no checkpoint at"):
        open_source(tmp_path / "nothing")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="folder is not a checkpoint of a known format"):
        open_source(tmp_path / "folder")
    (tmp_path / "latest").write_text("global_step7")
    with pytest.raises(DataError, match="latest names global_step7, which does not exist"):
        open_source(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b'\x08\0\0\0\0\0\0\0{"a":')
    with pytest.raises(DataError, match="a.safetensors is torn, or not a safetensors file"):
        open_source(tmp_path / "a.safetensors")
    shutil.copytree(own, tmp_path / "own")
    shard = next((tmp_path / "own").glob("*.safetensors"))
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(DataError, match=f"{shard.name} has .* bytes, its manifest says"):
        open_source(tmp_path / "own")
    shard.unlink()
    with pytest.raises(DataError, match=f"{shard.name} is missing"):
        open_source(tmp_path / "own")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/outside.safetensors", "deeper/outside.safetensors", "..", "", 7])
def test_an_index_cannot_name_files_elsewhere(tmp_path, name):
    (tmp_path / "given").mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "outside.safetensors")
    index = tmp_path / "given" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(DataError, match=f"{index} names {name!r}, which is not a file in its folder"):
        open_source(tmp_path / "given")


@pytest.mark.parametrize("name", ["../zero", "..", "{}/zero", ""])
def test_a_pointer_cannot_name_a_checkpoint_elsewhere(tmp_path, zero, name):
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "latest").write_text(name.format(tmp_path))
    with pytest.raises(DataError, match="latest names '.*', which is not a folder next to it"):
        open_source(tmp_path / "given")


@pytest.mark.parametrize("how", ["compressed", "in another order", "without room between", "with folders"])
def test_a_repacked_pth_is_refused_and_not_misread(tmp_path, weights, how):
    """torch.load reads it, but its values are not where torch.save would have put them."""
    torch.save(weights, tmp_path / "saved.pth")
    with zipfile.ZipFile(tmp_path / "saved.pth") as saved:
        names = saved.namelist()
        contents = {name: saved.read(name) for name in (sorted(names) if how == "in another order" else names)}
    kind = zipfile.ZIP_DEFLATED if how == "compressed" else zipfile.ZIP_STORED
    with zipfile.ZipFile(tmp_path / "anew.pth", "w", kind) as anew:
        if how == "with folders":
            anew.mkdir("saved/data")
        for name, content in contents.items():
            anew.writestr(name, content)
    assert_bitwise(torch.load(tmp_path / "anew.pth"), weights)
    with pytest.raises(DataError, match="anew.pth was repacked: its values are not where torch.save puts them"):
        open_source(tmp_path / "anew.pth")
    with open_source(tmp_path / "saved.pth") as source:
        assert_bitwise({name: source.whole(f"model/{name}") for name in weights}, weights)


def test_a_pth_of_the_other_byte_order_is_refused(tmp_path, weights):
    torch.save(weights, tmp_path / "saved.pth")
    content = (tmp_path / "saved.pth").read_bytes()
    with zipfile.ZipFile(tmp_path / "saved.pth") as saved:
        (name,) = [name for name in saved.namelist() if name.endswith("/byteorder")]
    with zipfile.ZipFile(io.BytesIO(content)) as saved, zipfile.ZipFile(tmp_path / "other.pth", "w") as other:
        for entry in saved.namelist():
            other.writestr(entry, b"big" if entry == name else saved.read(entry))
    with pytest.raises(DataError, match="other.pth was written on a machine of the other byte order"):
        open_source(tmp_path / "other.pth")


@pytest.mark.parametrize("old", [False, True])
def test_weights_in_float64_are_refused_and_not_rounded(tmp_path, weights, old):
    doubles = {name: tensor.double() for name, tensor in weights.items()}
    torch.save(doubles, tmp_path / "doubles.pth", _use_new_zipfile_serialization=not old)
    with pytest.raises(DataError, match="is torch.float64; only float32, bfloat16 and float16 are supported"):
        open_source(tmp_path / "doubles.pth")


@pytest.mark.parametrize("old", [False, True])
def test_damage_anywhere_in_a_pth_is_a_one_line_error(tmp_path, old):
    torch.save({"model": {"a": torch.zeros(3), "b": [1, 2]}}, tmp_path / "saved.pth", _use_new_zipfile_serialization=not old)
    content, draw = (tmp_path / "saved.pth").read_bytes(), random.Random(0)
    for _ in range(150):
        damaged = bytearray(content)
        if old:  # a wrong size would be allocated
            del damaged[draw.randrange(len(damaged)) :]
        else:
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        (tmp_path / "damaged.pth").write_bytes(damaged)
        with contextlib.suppress(DataError):
            open_source(tmp_path / "damaged.pth").reader.close()


def test_safetensors_that_are_truncated_or_lack_what_their_index_lists(tmp_path):
    save_file({"a": torch.zeros(100), "b": torch.zeros(3)}, tmp_path / "one.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "one.safetensors", "c": "one.safetensors"}}')
    with pytest.raises(DataError, match="lists 1 tensors that its files lack, first c"):
        open_source(tmp_path)
    os.truncate(tmp_path / "one.safetensors", (tmp_path / "one.safetensors").stat().st_size - 1)
    with pytest.raises(DataError, match="it is truncated"):
        open_source(tmp_path / "one.safetensors")
    content = (tmp_path / "one.safetensors").read_bytes()
    (tmp_path / "one.safetensors").write_bytes(content.replace(b'"shape":[3]', b'"shape":[4]'))
    with pytest.raises(DataError, match="one.safetensors is torn, or not a safetensors file"):
        open_source(tmp_path / "one.safetensors")


@pytest.mark.parametrize(
    ("shape", "offsets"),
    [
        ([4], [-16, 0]),  # the end of the header, as weights
        ([4], [0.0, 16.0]),
        ([4], [16, 0]),
        ([4], [False, 16]),
        ([-2, -2], [0, 16]),
        ([2.0, 2], [0, 16]),
        ([2**32, 2**32], [0, 0]),  # no elements, modulo 2**64
        ([2**70, 0], [0, 0]),
        ([2**70], [0, 2**72]),
        ("ab", [0, 0]),
        (None, [0, 0]),
        ([4], [0, 16, 32]),
    ],
)
def test_impossible_shapes_and_places_in_safetensors_are_refused(tmp_path, shape, offsets):
    entries = {
        "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        "b": {"dtype": "F32", "shape": shape, "data_offsets": offsets},
    }
    header = json.dumps(entries).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(DataError, match="x.safetensors is torn, or not a safetensors file"):
        open_source(tmp_path / "x.safetensors")


def test_headers_and_indices_nested_too_deeply_for_the_parser_are_torn(tmp_path):
    (tmp_path / "model.safetensors").write_bytes((100000).to_bytes(8, "little") + b"[" * 100000)
    with pytest.raises(DataError, match="model.safetensors is torn, or not a safetensors file"):
        open_source(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[" * 100000)
    with pytest.raises(DataError, match="model.safetensors.index.json is not an index"):
        open_source(tmp_path)


@pytest.mark.parametrize("kind", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_damage_anywhere_in_an_archive_is_found_or_harmless(tmp_path, kind):
    torch.save({"a": torch.zeros(3)}, tmp_path / "saved.pth")
    with zipfile.ZipFile(tmp_path / "saved.pth") as saved, zipfile.ZipFile(tmp_path / "whole.pth", "w", kind) as whole:
        for name in saved.namelist():
            whole.writestr(name, saved.read(name))
    content, draw = (tmp_path / "whole.pth").read_bytes(), random.Random(0)
    source = Source(tmp_path, "", {}, InMemory({}), [tmp_path / "damaged.pth"])
    for _ in range(2000):
        damaged = bytearray(content)
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        (tmp_path / "damaged.pth").write_bytes(damaged)
        with contextlib.suppress(DataError):
            verify_source(source, lambda _: None)


def test_text_files_of_any_bytes_beside_a_checkpoint(tmp_path, own):
    (tmp_path / "latest").write_bytes(b"global_step\xff")
    with pytest.raises(DataError, match="latest names global_step\ufffd, which does not exist"):
        open_source(tmp_path)
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    (tmp_path / "SHA256SUMS").write_bytes(b"0" * 64 + b"  \xff.bin\n" + b"1" * 64 + b"  a.safetensors\n")
    with open_source(tmp_path / "a.safetensors") as source:
        assert source.checksums[tmp_path / "a.safetensors"] == "1" * 64


@pytest.mark.parametrize("shapes", [{"a": [2]}, [{"a": 2.5}], [3], 3])
def test_a_layout_that_is_not_of_a_universal_checkpoint_is_refused(tmp_path, shapes):
    (tmp_path / "zero").mkdir()
    torch.save({"param_shapes": shapes, "global_steps": 1}, tmp_path / "mp_rank_00_model_states.pt")
    torch.save({"param_groups": []}, tmp_path / "zero" / "optimizer_state.pt")
    with pytest.raises(DataError, match=f"{tmp_path} is not laid out as DeepSpeed 0.19.8's universal checkpoints"):
        open_source(tmp_path)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("tensor", [torch.eye(3).to_sparse(), torch.empty(3, device="meta")], ids=["sparse", "meta"])
def test_tensors_without_values_in_a_row_are_refused(tmp_path, old, tensor):
    torch.save({"a": torch.ones(2), "b": tensor}, tmp_path / "x.pth", _use_new_zipfile_serialization=not old)
    with pytest.raises(DataError, match="x.pth"):
        open_source(tmp_path / "x.pth")


def test_a_rank_file_of_a_high_number_is_one_of_many(zero):
    (zero / "zero_pp_rank_300000000_mp_rank_00_optim_states.pt").touch()
    with pytest.raises(DataError, match="lacks zero_pp_rank_3_mp_rank_00_optim_states.pt"):
        open_source(zero)


def test_a_pth_with_any_compressed_entry_is_refused_unread(tmp_path, monkeypatch):
    torch.save({"a": torch.ones(2)}, tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "x.pth") as saved, zipfile.ZipFile(tmp_path / "y.pth", "w") as anew:
        for name in saved.namelist():
            kind = zipfile.ZIP_DEFLATED if name.endswith("data.pkl") else zipfile.ZIP_STORED
            anew.writestr(name, saved.read(name), compress_type=kind)
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(DataError, match="y.pth was repacked"):
        open_source(tmp_path / "y.pth")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_few_bytes_that_ask_for_more_memory_than_there_is(tmp_path):
    (tmp_path / "x.pth").write_bytes(b"\x80\x02cbuiltins\nbytearray\n\x8a\x07" + (10**15).to_bytes(7, "little") + b"\x85R.")
    with pytest.raises(DataError, match="x.pth is torn, or not a torch.save file"):
        open_source(tmp_path / "x.pth")


def test_shapes_are_known_without_reading_values(tmp_path):
    write_zero3(tmp_path / "zero", STATE)
    with open_source(tmp_path / "zero") as source:
        assert source.names("exp_avg") == {name: torch.Size(shape) for name, shape in SHAPES.items()}
