"""`torch.compile` without graph breaks over a pass for masses, forward and backward."""

import pytest
import torch
from tiny_models import packed, padded, random_prompts, tiny

from abft.models.attention import enable
from abft.models.masses import layer_masses
from abft.models.projections import train_parameters

LENGTHS = (12, 9)


@pytest.mark.parametrize("restricted", [False, True])
@pytest.mark.parametrize("layout", ["left", "packed"])
def test_a_compiled_pass_gives_the_same_gradients(layout, restricted):
    prompts, groups = random_prompts(LENGTHS)
    batch = packed(prompts, groups) if layout == "packed" else padded(prompts, groups, "left")
    if layout == "left":
        lengths = batch.pop("attention_mask").sum(1)
        batch |= {"seq_lens": lengths, "seq_starts": max(LENGTHS) - lengths}
    model = enable(tiny("llama"))
    train_parameters(model)

    def loss(**batch):
        return torch.stack(layer_masses(model, **batch, detach=restricted)).square().sum()

    parameters = [p for p in model.parameters() if p.requires_grad]
    plain = torch.autograd.grad(loss(**batch), parameters)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for one, other in zip(torch.autograd.grad(compiled(**batch), parameters), plain, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
