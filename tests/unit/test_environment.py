"""What the doctor finds around a run: harmful settings, old or differing software, disks, clocks; and two ranks' network."""

import re

import pytest
import torch

from tests.processes import launch
from tests.unit.conftest import write_set
from xar_scale import dist, doctor, environment
from xar_scale.environment import clocks, disk, network, settings, software
from xar_scale.errors import FileError

HERE = {"OMP_NUM_THREADS": "1"}


def named(findings) -> dict[str, str]:
    return {finding.what: finding.advice for finding in findings}


@pytest.mark.parametrize("name", environment.SETTINGS)
def test_harmful_settings_are_named_with_advice(name):
    hurts, why = environment.SETTINGS[name]
    value = next(value for value in ("0", "1", "INFO", "DETAIL") if hurts(value))
    assert named(settings(HERE | {name: value}, 1, 8))[name] == why
    assert name not in named(settings(HERE | {name: "WARN"}, 1, 8)) and name not in named(settings(HERE, 1, 8))


@pytest.mark.parametrize(
    ("name", "value", "good"),
    [
        *(("GLOO_SOCKET_IFNAME", value, good) for value, good in (("eth0", True), ("eth", False), ("eth0,ib0", False))),
        *(("NCCL_SOCKET_IFNAME", value, good) for value, good in (("eth", True), ("=eth", False), ("ib,=eth", False))),
        *(("NCCL_SOCKET_IFNAME", value, good) for value, good in (("=ib0,eth0", True), ("^lo", True), ("^lo,eth", False))),
        *(("NCCL_SOCKET_IFNAME", value, good) for value, good in (("^=l,eth0", True), ("^=lo,eth0", False), ("=^lo", False))),
    ],
)
def test_a_missing_interface_is_named_with_the_existing_ones(monkeypatch, name, value, good):
    monkeypatch.setattr(environment.socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth0")])
    said = "no such interface; this node has lo, eth0: name one of them"
    assert named(settings(HERE | {name: value}, 1, 8)).get(name) == (None if good else said)


def test_a_rank_with_a_slow_or_different_device_is_named(monkeypatch):
    rows = {"bf16": ("600", "is bf16 (error 3e-03)"), "tf32": ("-", "refused: compute capability 7.5 has no TF32")}
    told = [("a", rows), ("a", rows), ("b", rows | {"bf16": ("400", "is NOT bf16: error 3e-04")})]
    monkeypatch.setattr(dist, "gather_objects", lambda _: told)
    found = environment.arithmetic([])
    assert [finding.what for finding in found if finding.what.startswith("bf16")] == ["bf16 of rank 2 (b)"] * 2
    assert found[0].found == "400 TFLOP/s, the median rank 600" and "throttled" in found[0].advice
    assert found[1].found == "is NOT bf16: error 3e-04" and "exclude the node" in found[1].advice
    assert {finding.what for finding in found[2:]} == {"tf32 of rank 1 (a)", "tf32 of rank 2 (b)"}
    told[1:] = [told[0]]
    rows.pop("tf32")
    assert environment.arithmetic([]) == []


def test_more_threads_than_cores_are_named():
    assert "OMP_NUM_THREADS" not in named(settings({"OMP_NUM_THREADS": "2"}, 4, 8))
    assert "OMP_NUM_THREADS" in named(settings({"OMP_NUM_THREADS": ""}, 4, 8))  # as if it were not set
    found = named(settings({"OMP_NUM_THREADS": "3"}, 4, 8))
    assert found["OMP_NUM_THREADS"] == "4 ranks x 3 threads share 8 cores: set at most 2"
    assert "not set: 8" in [finding.found for finding in settings({}, 4, 8)]


@pytest.mark.parametrize("value", ["auto", "0", "-1", "2x", ""])
def test_a_number_of_threads_that_openmp_ignores_counts_as_all_cores(value):
    (found,) = (finding for finding in settings({"OMP_NUM_THREADS": value}, 4, 8) if finding.what == "OMP_NUM_THREADS")
    assert found.found == f"{value or 'not set'}: 8" and found.advice.startswith("4 ranks x 8 threads share 8 cores")
    assert "OMP_NUM_THREADS" not in named(settings({"OMP_NUM_THREADS": value}, 1, 8))


def test_few_open_files_and_little_shared_memory(monkeypatch):
    monkeypatch.setattr(environment.resource, "getrlimit", lambda _: (1024, 1 << 20))
    usage = environment.shutil.disk_usage("/")
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda _: usage._replace(total=64 << 20))
    found = named(settings(HERE, 1, 8))
    assert found["open files"].startswith("ulimit -n 4096: ") and "--shm-size" in found["/dev/shm"]
    monkeypatch.setattr(environment.resource, "getrlimit", lambda _: (1 << 20, 1 << 20))
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda _: usage._replace(total=64 << 30))
    assert named(settings(HERE, 1, 8)) == {}


def test_outdated_or_differing_software(monkeypatch):
    good = {"deepspeed": "0.19.8", "apex": "not installed"}
    assert software(good) == [] and software({"deepspeed": "not installed"}) == []
    assert "0.19.8" in named(software({"deepspeed": "0.19.7"}))["deepspeed"]
    monkeypatch.setattr(dist, "gather_objects", lambda mine: [mine, mine, mine | {"torch": "2.11"}])
    (found,) = software(good | {"torch": "2.15"})
    assert found[:2] == ("torch", "2.15 on rank 0, 2.11 on rank 2")


def test_another_package_named_apex_is_to_be_uninstalled(monkeypatch, tmp_path):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    facts = doctor.facts(doctor.this_machine(torch.device("cpu")))
    (found,) = software(dict(facts))
    assert found.found.startswith(f"{tmp_path / 'apex'} is not NVIDIA's apex, which has apex.optimizers, but")
    assert found.advice.startswith("pip uninstall apex")
    (tmp_path / "apex" / "optimizers").mkdir()
    assert software(dict(facts)) == []


def test_disks_are_measured_and_left_as_they_were(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "DISK_BYTES", 1 << 23)
    free, written, read = disk("run", tmp_path, written=True)
    assert free.what == f"run {tmp_path}" and re.fullmatch(r"\d+ GB free", free.found)
    assert all(re.fullmatch(r"[1-9]\d* MB/s", finding.found) for finding in (written, read))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(environment, "FREE_GB", 1 << 40)
    assert disk("run", tmp_path, written=True)[0].advice.startswith("free some space")
    write_set(tmp_path)
    (tmp_path / "a.tar").write_bytes(bytes(1 << 20))
    free, read = disk("data", tmp_path, written=False)
    assert read.what == "  read, a.tar" and free.advice == ""


def test_a_test_file_that_does_not_fit_on_the_disk_is_named_and_removed(tmp_path, largest_file):
    largest_file(1 << 20)
    with pytest.raises(FileError, match=f"^{tmp_path}/.doctor-[0-9]+: File too large$"):
        disk("run", tmp_path, written=True)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_data_set_is_named_with_advice(tmp_path):
    _, found = disk("data", tmp_path, written=False)
    assert found.what == "  data set" and found.advice.startswith("training on it would exit with 65: ")
    assert found.found == f"{tmp_path}/dataset.json is missing: not a data set, or an incomplete one"
    (tmp_path / "dataset.json").write_text('{"format": 1}')
    assert "has format 1, this version reads 2" in disk("data", tmp_path, written=False)[1].found


def test_clocks_that_are_apart(monkeypatch):
    monkeypatch.setattr(dist, "world", lambda: 3)
    told = [(100.0, "a"), (103.5, "b"), (100.1, "c")]
    monkeypatch.setattr(dist, "gather_objects", lambda _: told)
    (found,) = clocks()
    assert found.found == "within 3.50 s" and "logs of a and b" in found.advice
    told[1] = (100.2, "b")
    assert clocks()[0].advice == ""


def test_one_process_has_no_network():
    assert network(torch.device("cpu")) == [] and clocks() == []


def test_two_ranks_are_shown_with_their_network(tmp_path):
    words = ["-m", "xar_scale", "doctor", "--run-dir", str(tmp_path), "--data", str(tmp_path)]
    ended = launch(2, words, tmp_path / "logs", NCCL_P2P_DISABLE="1")
    assert ended.codes == [0, 0], ended.text
    said = ended.outputs[0]
    for what in ("all-reduce of 1 MB", "all-gather of 64 MB"):
        assert re.search(rf"^{what} +\d+\.\d\d GB/s per rank, \d+\.\d\d ms$", said, re.MULTILINE), said
    assert re.search(r"^clocks +within 0\.\d\d s$", said, re.MULTILINE)
    assert re.search(r"^NCCL_P2P_DISABLE +1 +GPUs of a node communicate through host memory: unset it$", said, re.MULTILINE)
    assert ended.outputs[1] == ""


def test_folders_that_are_not_there_are_refused(tmp_path):
    ended = launch(1, ["-m", "xar_scale", "doctor", "--data", str(tmp_path / "nowhere")], tmp_path / "logs")
    assert ended.codes == [64] and f"xar-scale: no folder at {tmp_path / 'nowhere'}, on rank 0\n" in ended.text
