"""One process of `test_distributed`: `torchrun distributed_run.py FOLDER`.

FOLDER holds `prompts.pt` and `runs.json`: a list of {name, kind, options}. Writes NAME.pt for each.
"""

import json
import sys
import warnings
from pathlib import Path

import torch
from accelerate import DistributedType, PartialState
from tiny_models import tiny
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from abft.training.config import ABFTConfig
from abft.training.trainer import ABFTTrainer

warnings.simplefilter("ignore")
torch.set_num_threads(1)


def whole(tensor):
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def main(folder: Path) -> None:
    prompts = torch.load(folder / "prompts.pt", weights_only=False)
    for run in json.loads((folder / "runs.json").read_text()):
        args = ABFTConfig(output_dir=str(folder / "output" / run["name"]), **run["options"])
        if args.fsdp or args.tensor_parallel_size > 1:
            # accelerate gives these engines to GPUs only; the engines themselves run on gloo.
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        model = tiny(run["kind"], spread=0.7).to(getattr(torch, run["dtype"]))
        if args.tensor_parallel_size > 1:
            model.save_pretrained(folder / "base", is_main_process=args.process_index == 0)
            torch.distributed.barrier()
            model = AutoModelForCausalLM.from_pretrained(folder / "base", tp_plan="auto", dtype="auto")
        trainer = ABFTTrainer(model, args, prompts)
        trainer.train(resume_from_checkpoint=run.get("resume"))
        trainer.save_model(str(folder / "final" / run["name"]))
        model = trainer.accelerator.unwrap_model(trainer.model)
        weights = {name: whole(p) for name, p in model.named_parameters()}
        if trainer.is_world_process_zero():
            torch.save(
                {
                    "world": args.world_size,
                    "steps": args.gradient_accumulation_steps,
                    "weights": weights,
                    "log": [entry for entry in trainer.state.log_history if "loss" in entry],
                    "state": trainer.objective.state_dict(),
                    "sharded": sum(isinstance(p, DTensor) for p in model.parameters()),
                },
                folder / f"{run['name']}.pt",
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
