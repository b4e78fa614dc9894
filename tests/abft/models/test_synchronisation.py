"""No pass reads values back from the device, results apart: passes on the meta device, whose tensors have no values."""

import pytest
import torch
import transformers
from parity import batch_of
from tiny_models import CONFIGS, LOCAL, packed, padded, random_prompts

from abft.evaluation.classification import label_logits
from abft.models.attention import ATTENTION
from abft.models.masses import forward, forward_with_mass, layer_masses
from abft.models.projections import train_parameters
from abft.prompts.collation import MASS_INPUTS
from abft.training.config import ABFTConfig
from abft.training.objectives.objective_registry import objective_of
from abft_kernels import functional

KINDS = ["llama", "gpt2", *LOCAL]


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Choose the backend that a GPU would get; its operators have kernels for the meta device."""
    monkeypatch.setattr(functional, "_choose", lambda backend, *_: "triton")
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # it knows no meta device


def make_model(kind):
    name, options = CONFIGS[kind]
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(
            getattr(transformers, name)(**options), attn_implementation=ATTENTION
        )


def without_values(batch):
    return {name: value.to("meta") for name, value in batch.items()}


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


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.tolist(),
        lambda x: bool(x.all()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.equal(x, x + 1),
        lambda x: x.unique(),
        lambda x: x.repeat_interleave(x.long()),
        lambda x: x.cpu(),
    ],
    ids=["tolist", "if", "nonzero", "mask", "equal", "unique", "repeat", "host"],
)
def test_a_read_would_raise(read):
    with pytest.raises((RuntimeError, NotImplementedError)):
        read(torch.ones(3, device="meta"))


def counts(samples):
    """The entries of a batch that losses read beside its layout."""
    ones = torch.ones(samples, 1, dtype=torch.long)
    return {
        "correct_demonstrations": ones,
        "demonstrations": 2 * ones,
        "prompt_lengths": 20 * ones,
        "row_weights": ones.float(),
        "label_ids": ones[:, 0],
    }


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
def test_passes(kind, side):
    model, batch = make_model(kind), without_values(layout_of(side))
    train_parameters(model)
    for _, run in passes(model, batch):
        run()
    with torch.no_grad():
        if side != "packed":
            label_logits(model, batch, [3, 4])


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_padding(kind):
    model, batch = make_model(kind), without_values(batch_of("none"))
    del batch["attention_mask"]
    train_parameters(model)
    for _, run in passes(model, batch):
        run()


@pytest.mark.parametrize("side", ["right", "packed"])
@pytest.mark.parametrize("method", ["abft", "e2e"])
def test_objectives(method, side, tmp_path):
    model, batch = make_model("llama"), without_values({**layout_of(side), **counts(3)})
    train_parameters(model)
    objective = objective_of(method)(ABFTConfig(output_dir=str(tmp_path), method=method, use_cpu=True))
    outputs = (
        layer_masses(model, **{name: batch[name] for name in MASS_INPUTS if name in batch})
        if method == "abft"
        else objective.outputs(model, batch)
    )
    objective.losses(outputs, batch).per_sample.sum().backward()
