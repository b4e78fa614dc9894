"""Fine-tune a model on your own labelled texts, and see what its heads look at before and after.

    python docs/examples/finetune_csv.py --model path/to/model --csv reviews.csv --output runs/reviews

The CSV has the columns `text` and `label`. A third of the rows are queries to train on, a third the demonstrations, a
third the test.
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import abft
from abft.files import save_figure
from abft.plots import head_figure


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True, help="model folder, or a name on the Hugging Face Hub")
    parser.add_argument("--csv", required=True, help="columns text and label")
    parser.add_argument("--output", type=Path, required=True, help="folder of the run; must be new")
    parser.add_argument("--text_prefix", default="sentence:")
    parser.add_argument("--label_prefix", default="sentiment:")
    parser.add_argument("--k", type=int, default=4, help="demonstrations per prompt")
    parser.add_argument("--learning_rate", type=float, default=2e-5)
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args()

    examples, labels = abft.load_examples(options.csv)
    third = len(examples) // 3
    parts = abft.split_examples(examples, {"train": third, "pool": third, "test": third}, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    template = abft.Template(options.text_prefix, options.label_prefix)
    builder = abft.PromptBuilder(tokenizer, abft.Task("mine", labels, template))
    train, test = (
        abft.sample_prompts(builder, parts[name], parts["pool"], options.k, seed)
        for seed, name in enumerate(("train", "test"))
    )

    # float32: bfloat16 rounds most of a small update away.
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="float32")
    config = abft.ABFTConfig(
        output_dir=str(options.output), learning_rate=options.learning_rate, use_cpu=options.cpu, packing=True
    )
    trainer = abft.ABFTTrainer(model, config, train)
    before = abft.evaluate(model, test), abft.head_statistics(model, test)
    trainer.train()
    after = abft.evaluate(model, test), abft.head_statistics(model, test)
    trainer.save_model()
    save_figure(head_figure(before[1], after[1], ("before", "after")), options.output / "heads.png")
    print(f"accuracy {before[0].accuracy:.1%} → {after[0].accuracy:.1%}; weights and heads.png in {options.output}")


if __name__ == "__main__":
    main()
