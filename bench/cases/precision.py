"""The gradient of a saturated head in bfloat16: this package's form of the mass against the two shortcuts.

    abft          dS_ij = P_ij Σ_g dmass_g (w_jg − mass_ig), w − mass in float32 for each element
    LSE           mass = exp(LSE_g − LSE): two attentions, each of which returns its gradient in bfloat16
    columns       indicator columns of V: the mass is an output in bfloat16, and D = dO·O is made from it

The two shortcuts compute as a bfloat16 kernel does: float32 inside, inputs and results rounded. The figure is
‖dQ − oracle‖ / ‖oracle‖ against float64, as the gradient of Σ mass, at mean masses from 0.5 to 0.999.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from bench.record import spread
from bench.result_file import write_result

name = "precision"
description = "any device: the bf16 gradient of saturated heads; this package, LSE difference, columns of V"

TARGETS = (0.5, 0.9, 0.98, 0.999)
_TOKENS, _HEAD_DIM, _HEADS = 256, 64, 4


def _saturated(target: float, seed: int) -> tuple[Any, Any]:
    """Return bfloat16 q and k `(1, H, N, D)` such that key 0 takes `target` of the mass on average."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(_HEADS, 1, _HEAD_DIM, generator=generator)
    q = direction + 0.2 * torch.randn(_HEADS, _TOKENS, _HEAD_DIM, generator=generator)
    k = torch.randn(_HEADS, _TOKENS, _HEAD_DIM, generator=generator)
    low, high = 0.0, 20.0
    for _ in range(40):  # the mass grows with the length of the labelled key
        middle = (low + high) / 2
        k[:, 0] = direction[:, 0] * middle
        mass = torch.softmax((q @ k.transpose(-1, -2)).double() * _HEAD_DIM**-0.5, -1)[..., 0].mean()
        low, high = (middle, high) if mass < target else (low, middle)
    return q[None].to(torch.bfloat16), k[None].to(torch.bfloat16)


def _shortcuts(q: Any, k: Any, groups: Any) -> dict[str, Any]:
    """Return dQ of Σ mass by the two shortcuts, as bfloat16 kernels compute it."""
    import torch

    def bf16(x: Any) -> Any:
        return x.to(torch.bfloat16).float()

    scale = _HEAD_DIM**-0.5
    weights = torch.softmax((q.float() @ k.float().transpose(-1, -2)) * scale, -1)
    labelled = (groups == 0).float()[:, None, None]
    mass = (weights * labelled).sum(-1, keepdim=True)
    keys = k.float()
    # d mass / d LSE_g = mass and d mass / d LSE = −mass; each attention's dQ is dlse · P K, P and dQ rounded.
    of_group = bf16((bf16(mass * weights * labelled / mass) @ keys) * scale)
    of_all = bf16((bf16(mass * weights) @ keys) * scale)
    columns = bf16((bf16(weights * (labelled - bf16(mass))) @ keys) * scale)
    return {"LSE difference": of_group - of_all, "V columns": columns}


def collect(device: Any, seeds: int = 5) -> list[dict[str, Any]]:
    """Return a row for each mean mass and form: median and spread of the relative error over seeds."""
    import torch

    import abft_kernels
    from bench.gpu.timing import relative_error

    groups = torch.full((1, _TOKENS), -1, device=device)
    groups[:, 0] = 0
    backends = [b for b in ("triton", "torch") if abft_kernels.available_backends(device)[b] == "available"]
    rows = []
    for target in TARGETS:
        errors: dict[str, list[float]] = {}
        for seed in range(seeds):
            q, k = (x.to(device) for x in _saturated(target, seed))

            def gradient(backend: str, dtype: Any, q: Any = q, k: Any = k) -> Any:
                leaves = [x.to(dtype).requires_grad_() for x in (q, k)]
                mass = abft_kernels.row_mass(*leaves, groups, 1, causal=False, backend=backend)
                return torch.autograd.grad(mass.sum(), leaves[0])[0]

            oracle = gradient("reference", torch.float64)
            found = {f"abft, {backend}": gradient(backend, torch.bfloat16) for backend in backends}
            for form, dq in {**found, **_shortcuts(q, k, groups)}.items():
                errors.setdefault(form, []).append(relative_error(dq, oracle))
        rows += [{"mass": target, "form": form, "error": spread(values)} for form, values in errors.items()]
    return rows


def run(out_dir: Path) -> Path:
    """Write `precision_cuda.json`, or `precision_cpu.json` with the kernels interpreted, and return its path."""
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def data() -> dict[str, Any]:
        rows = collect(device)
        for row in rows:
            print(f"mass {row['mass']:<6} {row['form']:16} error of dQ {row['error']['median']:.3%}")
        return {"tokens": _TOKENS, "head_dim": _HEAD_DIM, "rows": rows}

    return write_result(out_dir / f"precision_{device.type}.json", data, ("torch", "triton"))
