"""Comparison of the adapter with eager attention: batches, a pass through either, and results that must be equal."""

import torch
from tiny_models import SERVED, packed, padded, random_prompts

from abft.models.masses import forward_with_mass
from abft_kernels.triton.common import INTERPRETED

TRITON_RUNS = INTERPRETED or torch.cuda.is_available()
LENGTHS = (20, 13, 17)
KINDS = list(SERVED)


def batch_of(side: str, seed: int = 0) -> dict[str, torch.Tensor]:
    prompts, groups = random_prompts((20, 20) if side == "none" else LENGTHS, seed)
    return packed(prompts, groups) if side == "packed" else padded(prompts, groups, side)


def positions(batch):
    if "cu_seqlens" in batch:
        return torch.cat([torch.arange(n) for n in batch["cu_seqlens"].diff().tolist()])[None]
    return (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)


def last_rows(batch, x):
    """Return the last row of each prompt, `(prompts, H, 1, …)`, from `(B, H, N, …)`."""
    rows = batch["query_positions"]
    if "cu_seqlens" in batch:
        return x[0][:, rows].movedim(1, 0)
    return x.take_along_dim(rows[:, None, :, None], dim=2)


def query_key(model):
    """The parameters that hold W_Q and W_K, v too where the three are one."""
    names = ("q_proj.weight", "k_proj.weight", "c_attn.weight", "qkv_proj.weight", "query_key_value.weight", "sinks",
             "q_a_proj.weight", "q_b_proj.weight", "kv_a_proj_with_mqa.weight", "kv_b_proj.weight")  # fmt: skip
    return {name: parameter for name, parameter in model.named_parameters() if name.endswith(names)}


def eager_masses(attentions, batch, all_rows=False):
    groups = batch["key_groups"]
    indicator = torch.stack([groups == g for g in (0, 1)], dim=-1).to(attentions[0].dtype)
    masses = [probabilities @ indicator[:, None] for probabilities in attentions]
    return masses if all_rows else [last_rows(batch, mass) for mass in masses]


def loss_of(logits, masses, batch):
    """Cross-entropy at the last tokens and both masses, all weighted differently."""
    last = last_rows(batch, logits[:, None])[:, 0, 0]
    loss = torch.nn.functional.cross_entropy(last, torch.arange(len(last)) + 5)
    for layer, mass in enumerate(masses):
        weights = torch.linspace(-1, 2, mass[0].numel()).view(mass.shape[1:])
        loss = loss + (layer + 1) * (weights * mass).sum()
    return loss


def run(model, batch, attention, **options):
    """Logits, masses and gradients of a loss on both, by eager attention or by the adapter."""
    model.set_attn_implementation(attention)
    model.zero_grad()
    arguments = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
    if attention == "eager":
        # With a cache transformers does not look for packed sequences.
        outputs = model(**arguments, position_ids=positions(batch), output_attentions=True, use_cache=False)
        masses = eager_masses(outputs.attentions, batch)
    else:
        options = {name: batch[name] for name in ("query_positions", "cu_seqlens") if name in batch} | options
        outputs = forward_with_mass(model, **arguments, **options, key_groups=batch["key_groups"], logits_to_keep=0)
        masses = outputs.attentions
    loss_of(outputs.logits, masses, batch).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in query_key(model).items()}
    return outputs.logits.detach(), [mass.detach() for mass in masses], gradients


def assert_equal(got, want, batch, tolerance=1e-5):
    """Relative to the largest entry, at real tokens."""

    def close(a, b, what):
        error = (a - b).abs().max() / b.abs().max()
        assert a.shape == b.shape, what
        assert error < tolerance, f"{what}: {error:.1e}"

    real = batch["attention_mask"].bool() if "attention_mask" in batch else slice(None)
    close(got[0][real], want[0][real], "logits")
    for layer, (a, b) in enumerate(zip(got[1], want[1], strict=True)):
        close(a, b, f"mass of layer {layer}")
    assert got[2].keys() == want[2].keys()
    assert got[2]
    for name, gradient in got[2].items():
        close(gradient, want[2][name], name)
