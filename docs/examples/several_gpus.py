"""The same training on 8 GPUs, or 2 × 8: what differs is how it is launched.

    torchrun --nproc_per_node 8 docs/examples/several_gpus.py --model path/to/model --train reviews.jsonl --output run
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint host:29500 docs/examples/…

`--engine ddp`: the model on each GPU, other prompts on each; `fsdp`: weights split (full gradients); `tensor`: heads
split over all GPUs, for either gradient mode.
"""

import argparse
import os

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import abft


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True, help="model folder, or a name on the Hugging Face Hub")
    parser.add_argument("--train", required=True, help="JSONL or CSV of labelled texts")
    parser.add_argument("--output", required=True, help="folder of the run")
    parser.add_argument("--text_prefix", default="sentence:")
    parser.add_argument("--label_prefix", default="sentiment:")
    parser.add_argument("--k", type=int, default=4, help="demonstrations per prompt")
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--engine", choices=("ddp", "fsdp", "tensor"), default="ddp")
    parser.add_argument("--layer", default="LlamaDecoderLayer", help="with fsdp: the class of the model's layers")
    options = parser.parse_args()

    gpu, processes = torch.cuda.is_available(), int(os.environ.get("WORLD_SIZE", "1"))
    examples, labels = abft.load_examples(options.train)
    parts = abft.split_examples(examples, {"train": options.prompts, "pool": len(examples) - options.prompts}, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    template = abft.Template(options.text_prefix, options.label_prefix)
    builder = abft.PromptBuilder(tokenizer, abft.Task("mine", labels, template))
    prompts = abft.sample_prompts(builder, parts["train"], parts["pool"], options.k, seed=0)

    replicas = 1 if options.engine == "tensor" else processes
    engine = {
        "ddp": {},
        "fsdp": {
            "fsdp": True,
            "fsdp_config": {
                "version": 2,
                "transformer_layer_cls_to_wrap": [options.layer],
                "state_dict_type": "FULL_STATE_DICT",
            },
        },
        "tensor": {"tensor_parallel_size": processes, "save_strategy": "no"},
    }[options.engine]
    config = abft.ABFTConfig(
        output_dir=options.output,
        packing=True,
        per_device_train_batch_size=32 // replicas,
        use_cpu=not gpu,
        ddp_backend=None if gpu else "gloo",
        **engine,
    )
    split = {"tp_plan": "auto"} if options.engine == "tensor" else {}
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="float32", **split)
    trainer = abft.ABFTTrainer(model, config, prompts)
    trainer.train()
    trainer.save_model()
    if trainer.is_world_process_zero():
        print(f"trained on {processes} processes; weights in {options.output}")


if __name__ == "__main__":
    main()
