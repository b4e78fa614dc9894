"""ABFT of a 32B model on one GPU: a 4-bit base (NF4), LoRA on q and k, restricted gradients, packed prompts.

    python docs/examples/qlora_one_gpu.py --model Qwen/Qwen2.5-32B --train reviews.jsonl --output runs/32b

First it plans: if a pass of so many tokens does not fit, it says so before the weights are read.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import abft
from abft.models.attention import ATTENTION
from abft.training.plan import GIB, plan


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True, help="model folder, or a name on the Hugging Face Hub")
    parser.add_argument("--train", required=True, help="JSONL or CSV of labelled texts")
    parser.add_argument("--output", required=True, help="folder of the adapter")
    parser.add_argument("--text_prefix", default="sentence:")
    parser.add_argument("--label_prefix", default="sentiment:")
    parser.add_argument("--k", type=int, default=4, help="demonstrations per prompt")
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--tokens_per_batch", type=int, default=8192)
    options = parser.parse_args()

    gpu = torch.cuda.is_available()
    memory = torch.cuda.get_device_properties(0).total_memory / GIB if gpu else 8.0
    planned = plan(
        options.model, context=options.tokens_per_batch, mode="restricted", precision="nf4", gpu_memory=memory
    )
    print(*planned.parts.items(), sep="\n")
    if not planned.fits:
        raise SystemExit(f"does not fit in {memory:.0f} GiB; --tokens_per_batch {planned.longest_context} would")

    examples, labels = abft.load_examples(options.train)
    parts = abft.split_examples(examples, {"train": options.prompts, "pool": len(examples) - options.prompts}, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    template = abft.Template(options.text_prefix, options.label_prefix)
    builder = abft.PromptBuilder(tokenizer, abft.Task("mine", labels, template))
    prompts = abft.sample_prompts(builder, parts["train"], parts["pool"], options.k, seed=0)

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        options.model,
        quantization_config=quantization,
        device_map={"": 0 if gpu else "cpu"},
        dtype=torch.bfloat16,
        attn_implementation=ATTENTION,
    )
    config = abft.ABFTConfig(
        output_dir=options.output,
        lora=True,
        restricted_gradient=True,
        packing=True,
        use_cpu=not gpu,
        tokens_per_batch=options.tokens_per_batch,
        per_device_train_batch_size=32,
    )
    trainer = abft.ABFTTrainer(model, config, prompts)
    trainer.train()
    trainer.save_model()
    print(f"adapter in {options.output}; `abft merge` puts it into a 16-bit base")


if __name__ == "__main__":
    main()
