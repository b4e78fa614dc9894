"""Times: what is in them, and by which clock; and that competitors neither synchronise nor run out of memory."""

import time
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from bench.gpu import competitors, timing
from bench.gpu.budget import Budget
from bench.gpu.kernels import kernel_calls
from bench.gpu.setting import Setting, groups_of, inputs

CUDA = torch.device("cuda")
SYNCHRONISING = ("_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal", "unique", "masked_select")


@pytest.fixture
def no_card(monkeypatch):
    """Replace what `measure` asks of a card; return the calls of its parts."""
    seen = {}

    def device_times(run, device, seconds):
        seen["run"] = run
        return [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]

    def host_times(function, device, once):
        seen["once"] = once
        return [0.1, 0.2, 0.3]

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(timing, "_device_times", device_times)
    monkeypatch.setattr(timing, "_host_times", host_times)
    return seen


def test_compilation_is_in_no_figure(no_card, monkeypatch):
    def replay():
        pass

    monkeypatch.setattr(timing, "captured", lambda function, device: (SimpleNamespace(replay=replay), None))
    calls = []

    def function():
        calls.append(1)
        if len(calls) == 1:
            time.sleep(0.5)  # compiles

    times = timing.measure(function, CUDA)
    assert no_card["once"] < 0.4
    assert no_card["run"] is replay
    assert times["clock"] == "graph"
    assert (times["low"], times["median"], times["high"]) == (2.0, 3.5, 5.0)
    assert times["host_ms"] == {"median": 0.2, "low": 0.1, "high": 0.3}


def test_a_call_that_cannot_be_captured_is_timed_by_events(no_card, monkeypatch):
    def captured(function, device):
        raise RuntimeError("called a synchronizing CUDA operation")

    monkeypatch.setattr(timing, "captured", captured)

    def function():
        pass

    times = timing.measure(function, CUDA)
    assert no_card["run"] is function
    assert (times["clock"], times["clock_reason"]) == ("events", "called a synchronizing CUDA operation")
    assert "host_ms" in times


def test_repetitions_are_counted_from_a_second_run(monkeypatch):
    """The estimate of the device time leaves the first run out too."""
    ran = []

    class Event:
        def __init__(self, enable_timing):
            self.at = 0

        def record(self):
            self.at = len(ran)

        def elapsed_time(self, end):
            return 500.0 if self.at == 0 else 10.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(timing, "_FLUSH_BYTES", 16)
    times = timing._device_times(lambda: ran.append(1), torch.device("cpu"), 0.2)
    assert len(times) == int(200 / 10.1)
    assert len(ran) == 2 + len(times)


def test_host_times_do_not_wait_between_calls(monkeypatch):
    waits, ran = [], []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: waits.append(len(ran)))
    assert len(timing._host_times(lambda: ran.append(1), CUDA, 1e-4)) == 3
    assert waits == [0, 10, 20, 30]


def test_cpu_times_have_a_clock_and_host_times():
    times = timing.measure(lambda: None, torch.device("cpu"))
    assert times["clock"] == "wall"
    assert {"median", "low", "high"} == times["host_ms"].keys()


class Operators(TorchDispatchMode):
    """A mode that remembers the names of all operators."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def _unseen(function):
    """Return the function without the modes around it: PyTorch's compiler does not run under them."""

    def run(*args, **kwargs):
        with _disable_current_modes():
            return function(*args, **kwargs)

    return run


@pytest.mark.parametrize("name", competitors.FLEX)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_does_not_synchronise_while_it_is_timed(name):
    setting = Setting(torch.device("cpu"), Budget(60), tiny=True)
    qkv = [x.detach() for x in inputs(setting, (2, 4, 2), 48, 16)]
    groups = groups_of(qkv[0], dense=False)
    flex = competitors.Flex(compiled=False)
    flex._attention = _unseen(flex._attention)
    with Operators() as building:
        attention = competitors.FLEX[name](flex, qkv[0], groups, 2)
    with Operators() as timed:
        out, mass = attention(*qkv, groups, 2)
    assert any("nonzero" in operator for operator in building.names) == name.endswith("LSE")
    assert any("cat" in operator or "gather" in operator for operator in timed.names)
    assert not [operator for operator in timed.names if any(part in operator for part in SYNCHRONISING)]
    oracle_out, oracle_mass = competitors._eager(*qkv, groups, 2)
    torch.testing.assert_close(out, oracle_out)
    torch.testing.assert_close(mass, oracle_mass)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_predicted_memory_of_eager_attention(dtype):
    """The prediction is the peak of a forward and backward pass, but for tensors without N × N elements."""
    batch, heads, n = 1, 4, 1024
    q, k, v = (torch.randn(batch, h, n, 16, dtype=dtype, requires_grad=True) for h in (heads, 2, 2))
    groups = torch.zeros(batch, n, dtype=torch.int8)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        outputs = competitors._eager(q, k, v, groups, 2)
        torch.autograd.grad(outputs, [q, k, v], [torch.ones_like(x) for x in outputs])
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    assert peak == pytest.approx(competitors.eager_bytes(batch, heads, n, dtype.itemsize), rel=0.1)


def test_eager_attention_alone_is_predicted():
    calls = kernel_calls(Setting(CUDA, Budget(1), tiny=False))
    predicted = {call.about["n"]: call.square_bytes for call in calls if call.about["name"] == "eager"}
    assert predicted[16384] > 100 * 2**30
    calls = kernel_calls(Setting(CUDA, Budget(1), tiny=False))
    assert not [call for call in calls if call.about["name"] != "eager" and call.square_bytes]
