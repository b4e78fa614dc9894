"""`abft doctor`: what is installed, and which backends give right results here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from abft.cli.command import Command

if TYPE_CHECKING:
    import torch

    from abft_kernels import Backend

__all__ = ["COMMAND", "check_backend"]


def check_backend(backend: Backend, device: str) -> str:
    """Compare a small forward and backward with the fp64 oracle; return "works (…)", or what went wrong."""
    import torch

    from abft_kernels import mass_attention

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 96, 64, generator=generator) for heads in (4, 2, 2))
    groups = torch.randint(-1, 2, (1, 96), generator=generator)

    def gradients(backend: Backend, device: str, dtype: torch.dtype) -> list[torch.Tensor]:
        query, key, value = (x.to(device, dtype).requires_grad_() for x in (q, k, v))
        out, mass = mass_attention(query, key, value, groups.to(device), 2, backend=backend)
        loss = out.square().sum() + mass.square().sum()
        return [mass.detach(), *torch.autograd.grad(loss, (query, key, value))]

    try:
        ours = gradients(backend, device, torch.float32)
    except Exception as failure:  # whatever a broken installation raises is the finding
        return f"fails: {type(failure).__name__}: {failure}"
    exact = gradients("reference", "cpu", torch.float64)
    error = max(((a.cpu().double() - b).norm() / b.norm()).item() for a, b in zip(ours, exact, strict=True))
    return f"works (relative error {error:.0e})" if error < 1e-4 else f"wrong: relative error {error:.0e}"


def run() -> int:
    """Print the tables; return 0 if some backend works on every device and none fails, else 1."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from abft.provenance import versions
    from abft_kernels import available_backends

    console = Console()
    table = Table("package", "version", title="Installed")
    for name, version in versions().items():
        table.add_row(name, version)
    console.print(table)

    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    table = Table("device", "backend", "finding", title="Attention-mass backends, forward and backward in fp32")
    healthy = True
    for device in devices:
        findings = {
            backend: check_backend(backend, device) if status == "available" else f"unavailable: {status}"
            for backend, status in available_backends(device).items()
        }
        for backend, finding in findings.items():
            name = device if device == "cpu" else f"{device} {torch.cuda.get_device_name(device)}"
            table.add_row(name, backend, finding)
        healthy &= any(finding.startswith("works") for finding in findings.values())
        healthy &= not any(finding.startswith(("fails", "wrong")) for finding in findings.values())
    console.print(table)
    if devices == ["cpu"]:
        console.print("No GPU is visible: ABFT runs on PyTorch's kernels, and 'auto' means the torch backend.")
    return 0 if healthy else 1


COMMAND = Command("doctor", "show what is installed, and test the attention-mass backends", run)
