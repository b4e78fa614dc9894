"""No pass reads values back from the device, results apart: passes on fake CUDA tensors, which have no values."""

import abft_kernels.launch
import pytest
import torch
import transformers
import transformers.masking_utils
from parity import batch_of
from tiny_models import CONFIGS, packed, padded, random_prompts
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from abft.evaluation.classification import label_logits
from abft.models.attention import ATTENTION
from abft.models.masses import forward, forward_with_mass, layer_masses
from abft.models.projections import train_qk
from abft.prompts.collation import MASS_INPUTS

READS = {
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim",
    "unique_consecutive", "repeat_interleave",
}  # fmt: skip
KINDS = ["llama", "gpt2", "mistral_window", "gemma3"]


class NoReads(TorchDispatchMode):
    """Raises where a GPU would be waited for: at a value read on the host, and at a copy to or from it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {})) if self._name(function) not in READS else None
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        devices = {tensor.device.type for tensor in tensors}
        if "cuda" in devices and self._name(function) in READS:
            raise AssertionError(f"{function} reads values of a CUDA tensor")
        if self._name(function) in ("_to_copy", "copy_") and len(devices) > 1:
            raise AssertionError(f"{function} copies between the host and a CUDA device")
        return function(*args, **(kwargs or {})) if result is None else result

    @staticmethod
    def _name(function):
        return function.overloadpacket.__name__


@pytest.fixture
def on_cuda(monkeypatch):
    """Makes fake models and batches on CUDA; the launch table's architecture is told, since there is no GPU to ask."""
    monkeypatch.setattr(abft_kernels.launch, "architecture", lambda device: 90)
    monkeypatch.setattr(transformers.masking_utils, "is_tracing", lambda *_: False)  # it takes fake tensors for tracing
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:

        def model(kind):
            name, options = CONFIGS[kind]
            config = getattr(transformers, name)(**options)
            with torch.device("meta"):
                made = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION)
            return made.to_empty(device="cuda")

        def batch(real):
            return {name: mode.from_tensor(value).to("cuda") for name, value in real.items()}

        yield model, batch


def layout_of(side):
    """A batch as the collator makes it."""
    prompts, groups = random_prompts((20, 13, 17))
    if side == "packed":
        batch = packed(prompts, groups)
        batch["position_ids"] = torch.cat([torch.arange(len(prompt)) for prompt in prompts])[None]
        return batch
    batch = padded(prompts, groups, side)
    mask = batch.pop("attention_mask")
    batch["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    batch["seq_lens"] = mask.sum(1).int()
    if side == "left":
        batch["seq_starts"] = mask.argmax(1).int()
    return batch


def test_it_would_be_seen(on_cuda):
    _, to_cuda = on_cuda
    values = to_cuda({"x": torch.ones(3)})["x"]
    readers = {
        "tolist": values.tolist,
        "if": lambda: bool(values.all()),
        "nonzero": values.nonzero,
        "index": lambda: values[values > 0],
        "equal": lambda: torch.equal(values, values),
        "unique": values.unique,
        "repeat_interleave": lambda: values.repeat_interleave(values.long()),
        "to the host": values.cpu,
        "from the host": lambda: torch.ones(3).to("cuda"),
        "constant": lambda: torch.tensor([1], device="cuda"),
    }
    unseen = []
    with NoReads():
        for name, reader in readers.items():
            try:
                reader()
                unseen.append(name)
            except AssertionError:
                pass
        assert values.sum().device.type == "cuda"
    assert not unseen


def passes(model, batch):
    """Names and passes of training and of evaluation; batches as collators make them."""
    inputs = {name: batch[name] for name in MASS_INPUTS if name in batch}
    tokens = {name: value for name, value in inputs.items() if name not in ("key_groups", "query_positions")}

    def backward(mass):
        mass.sum().backward()
        return mass.detach()

    yield "masses", lambda: torch.stack(layer_masses(model, **inputs)).sum().backward()
    yield "restricted", lambda: layer_masses(model, **inputs, detach=True, on_mass=backward)
    yield "with mass", lambda: forward_with_mass(model, **inputs)
    yield "forward", lambda: forward(model, **tokens, logits_to_keep=1).logits.sum().backward()
    yield "momentum", lambda: forward(model, **tokens, momentum=0.5)


@pytest.mark.parametrize("side", ["left", "right", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_passes(kind, side, on_cuda):
    make, to_cuda = on_cuda
    model, batch = make(kind), to_cuda(layout_of(side))
    train_qk(model)
    for _, run in passes(model, batch):
        with NoReads():
            run()
    with torch.no_grad(), NoReads():
        if side != "packed":
            label_logits(model, batch, [3, 4])


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_padding(kind, on_cuda):
    make, to_cuda = on_cuda
    model, batch = make(kind), to_cuda(batch_of("none"))
    del batch["attention_mask"]
    train_qk(model)
    for _, run in passes(model, batch):
        with NoReads():
            run()
