"""Which heads copy from far back? Induction heads of any model at any length, from masses and never N × N.

    python docs/examples/induction_heads.py --model path/to/model --tokens 32768 --output heads.png

Random tokens, then the same once more. A row of the second half that has an induction head's habit looks at the token
that followed its own token in the first half. Sixteen such rows are asked, each for the mass on its own key, on four
draws of the tokens.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM

import abft
from abft.analysis.heads import HeadScores, induction_scores

ROWS = 16  # as many as there may be key groups


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
    scores = induction_scores(model, length=options.tokens, rows=ROWS)
    for layer, head, score in HeadScores(scores).top(10):
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
