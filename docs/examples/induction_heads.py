"""Which heads copy from far back? Induction heads of any model at any length, from masses and never N × N.

    python docs/examples/induction_heads.py --model path/to/model --tokens 32768 --output heads.png

Random tokens, then the same once more. A row of the second half that has an induction head's habit looks at the token
that followed its own token in the first half. Sixteen such rows are asked, each for the mass on its own key.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM

import abft

ROWS = 16  # as many as there may be key groups


def induction_scores(model: torch.nn.Module, tokens: int, seed: int = 0) -> torch.Tensor:
    """Mean mass on the key that an induction head copies, `(layers, heads)`."""
    half = tokens // 2
    generator = torch.Generator().manual_seed(seed)
    block = torch.randint(model.config.vocab_size, (1, half), generator=generator)
    rows = torch.linspace(half, 2 * half - 2, ROWS).long()
    groups = torch.full((1, 2 * half), -1, dtype=torch.int8)
    groups[0, rows - half + 1] = torch.arange(ROWS, dtype=torch.int8)
    inputs = {
        "input_ids": torch.cat([block, block], dim=1), "key_groups": groups, "query_positions": rows[None]
    }  # fmt: skip
    with torch.inference_mode():
        masses = abft.layer_masses(
            model, **{name: x.to(model.device) for name, x in inputs.items()}, num_groups=ROWS
        )  # each (1, H, 16, 16): row r on the key of row g
    return torch.stack([mass[0].diagonal(dim1=-2, dim2=-1).mean(-1).cpu() for mass in masses])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True, help="model folder, or a name on the Hugging Face Hub")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--output", type=Path, default=Path("induction_heads.png"))
    options = parser.parse_args()

    model = abft.enable(AutoModelForCausalLM.from_pretrained(options.model, dtype="auto"))
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    limit = model.config.max_position_embeddings
    if not 2 * ROWS + 2 <= options.tokens <= limit:
        parser.error(f"--tokens must be {2 * ROWS + 2} to {limit}, the model's context, got {options.tokens}")
    scores = induction_scores(model, options.tokens)
    for score, index in zip(*scores.flatten().topk(min(10, scores.numel())), strict=True):
        layer, head = divmod(int(index), scores.shape[1])
        print(f"layer {layer:3} head {head:3}: {score:.1%} on the token to copy")
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(scores, aspect="auto", cmap="viridis", vmin=0, vmax=1)
    axes.set(xlabel="head", ylabel="layer", title=f"mass on the token to copy, {options.tokens:,} tokens")
    figure.colorbar(picture)
    figure.savefig(options.output, dpi=160)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
