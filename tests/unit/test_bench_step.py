"""bench.py's step and sample: what is counted, and turns of the published code, from a checkout created here."""

import sys

import pytest
import torch

from tools import bench
from xar_scale.bench import published, step
from xar_scale.bench.published import BETAS, EMA_DECAY, Published
from xar_scale.bench.record import BASELINE, OURS, PUBLISHED, read_record
from xar_scale.bench.timing import WARM_UP
from xar_scale.bench.trace import Trace
from xar_scale.config import ModelConfig
from xar_scale.data.feed import Feed
from xar_scale.ema import EMA
from xar_scale.engines.single import SingleEngine
from xar_scale.errors import UsageError
from xar_scale.model.flops import training_flops
from xar_scale.presets import model_values

CPU = torch.device("cpu")
# Like the published code: it imports a library that may be absent, prints, and calls .cuda()
CHECKOUT = {
    "xar.py": """
from flash_attn import flash_attn_func
from models.network import Network

def xar_base(attn_dropout, proj_dropout):
    print("said by the published code")
    return Network((attn_dropout, proj_dropout)).eval()
""",
    "network.py": """
import torch

class Network(torch.nn.Module):
    calls = []

    def __init__(self, dropouts):
        super().__init__()
        self.dropouts = dropouts
        self.product = torch.nn.Linear(16, 16)

    def forward(self, latents, labels):
        print("said by the published code")
        noise = torch.randn(latents.shape).cuda()
        predicted = self.product((latents + noise).movedim(1, -1))
        self.calls.append((self.training, *latents.shape, *labels.shape, predicted.dtype))
        return predicted.float().square().mean()

    def sample_tokens(self, steps, guidance, labels):
        latents = self.product(torch.zeros(len(labels), 16, 16, 16).cuda())
        self.calls.append((self.training, steps, guidance, labels.tolist(), latents.dtype))
        return latents
""",
}


@pytest.fixture
def checkout(tmp_path):
    for name, content in CHECKOUT.items():
        (tmp_path / "models").mkdir(exist_ok=True)
        (tmp_path / "models" / name).write_text(content)
    cuda, path = torch.Tensor.cuda, [*sys.path]
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "models"]:  # so that another folder's are imported
        del sys.modules[name]
    assert torch.Tensor.cuda is cuda and sys.path == path


def calls() -> list[tuple]:
    """Calls of the published code's network."""
    return sys.modules["models.network"].Network.calls


def test_a_step_of_the_published_code_is_that_of_its_loop(checkout, capsys):
    theirs = Published(checkout, "xar_b", 0.25, CPU)
    before = [weight.detach().clone() for weight in theirs.weights]
    theirs.step(torch.randn(2, 16, 16, 16), torch.zeros(2), torch.bfloat16)
    assert theirs.network.dropouts == (0.25, 0.25)
    assert calls() == [(True, 2, 16, 16, 16, 2, torch.bfloat16)]
    groups = theirs.optimizer.param_groups
    assert [(group["weight_decay"], [weight.ndim for weight in group["params"]]) for group in groups] == [(0.02, [2]), (0, [1])]
    assert all(group["betas"] == BETAS for group in groups)
    for first, weight, average in zip(before, theirs.weights, theirs.ema, strict=True):
        assert not torch.equal(first, weight) and weight.grad is None
        torch.testing.assert_close(average.detach(), EMA_DECAY * first + (1 - EMA_DECAY) * weight.detach())
    with pytest.raises(UsageError, match="the published code's loss is not finite"):
        theirs.step(torch.full((2, 16, 16, 16), torch.inf), torch.zeros(2), torch.float32)
    assert capsys.readouterr().out == ""


@pytest.fixture
def measure(checkout, tmp_path, monkeypatch):
    """Run bench.py on the checkout, with nano in place of xar_b, and return the record."""
    monkeypatch.setitem(published.NAMES, "nano", "xar_base")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")

    def run(*words: str):
        small = ["--model", "nano", "--batch", "2", "--reference", str(checkout), "--json", str(tmp_path / "kept.json")]
        monkeypatch.setattr(sys, "argv", ["tools/bench.py", *words, *small])
        assert bench.main() == 0
        return read_record(tmp_path / "kept.json")

    return run


def test_a_step_s_record_has_what_was_measured(measure, monkeypatch, capsys):
    """Every step waits a second for its data; a matrix product takes two milliseconds."""
    counts = {SingleEngine.step: 0, EMA.update: 0}

    def counted(owner, work):
        def count(*arguments):
            counts[work] += 1
            return work(*arguments)

        monkeypatch.setattr(owner, work.__name__, count)

    counted(SingleEngine, SingleEngine.step)
    counted(EMA, EMA.update)
    take = Feed.take

    def wait(self):
        waited, taken = self.waited, take(self)
        self.waited = waited + 1.0
        return taken

    monkeypatch.setattr(Feed, "take", wait)
    monkeypatch.setattr(step, "median_ms", lambda *_: 2.0)
    monkeypatch.setattr(step, "peak_memory", lambda _, reset=False: 1e9 if reset else 3e9)
    monkeypatch.setattr(step, "trace", lambda *_: Trace([], 0.002, 0.001))
    found = measure("step", "--repeats", "2")
    assert [*counts.values()] == [
        WARM_UP + 1 + WARM_UP + 2
    ] * 2  # all timed steps, and before them those that the memory is read after
    assert found.flops == 2 * training_flops(ModelConfig(**model_values("nano")))
    assert found.peak == 2 * 1024**3 / 2e-3
    assert (found.memory_gb, found.data_wait_s, found.communication_s, found.hidden_s) == (2.0, 1.0, 0.002, 0.001)
    assert len(calls()) == WARM_UP + 2 and {*calls()} == {(True, 2, 16, 16, 16, 2, torch.float32)}
    assert {name: len(taken) for name, taken in found.seconds.items()} == {OURS: 2, BASELINE: 2, PUBLISHED: 2}
    said = capsys.readouterr().out
    assert f"| {found.speedup(PUBLISHED):.2f} |" in said.split("| published |")[1] and "said by" not in said


def test_sampling_takes_turns_with_the_published_code(measure):
    found = measure("sample", "--repeats", "1", "--steps", "1", "--guidance", "1.5")
    assert calls() == [(False, 1, 1.5, [0, 7], torch.float32)] * (WARM_UP + 1)
    assert {name: len(taken) for name, taken in found.seconds.items()} == {OURS: 1, BASELINE: 1, PUBLISHED: 1}
