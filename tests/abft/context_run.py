"""One process of the context-parallel test: `torchrun context_run.py FOLDER`."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tiny_models import tiny

from abft.models.attention import enable
from abft.models.masses import layer_masses
from abft.models.projections import train_parameters


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {}
    for name, case in torch.load(folder / "cases.pt").items():
        model = enable(tiny(case["kind"], spread=0.4))
        train_parameters(model)
        inputs = {key: case[key] for key in ("input_ids", "key_groups", "query_positions")}
        masses = torch.stack(layer_masses(model, **inputs, detach=case["detach"], context_group=dist.group.WORLD))
        (masses * case["weights"]).sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        for gradient in gradients.values():
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
        results[name] = {"masses": masses.detach(), "gradients": gradients}
    torch.save(results, folder / f"rank{dist.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
