"""`abft plan`: the memory of a run by part, whether it fits, and the longest context, before anything is loaded.

The model is built from its configuration as tensors that have shapes and no values, and one step runs on them: the
memory that autograd keeps is counted, not estimated. That takes seconds for any size, and needs no network if the
configuration is local.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoModelForCausalLM

from abft.models.attention import ATTENTION, check_architecture
from abft.models.loading import context_of, load_config
from abft.models.masses import layer_masses
from abft.models.mixed_precision import float32_masters
from abft.models.projections import lora_qk, train_parameters
from abft.training.objectives.objective import Objective
from abft.training.objectives.objective_registry import DEFAULT, plan_modes

__all__ = ["Plan", "modes", "plan"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "nf4": torch.bfloat16}
# 4-bit weights; a byte of scale for each 64; and of the scales themselves a float32 for each 256.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# The CUDA context with its libraries' workspaces, and what the caching allocator cannot hand out; assumed.
RESERVED = 1.5 * 2**30
GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """A plan: bytes of one GPU by part, the verdict, and the launch line.

    Args:
        parts: name -> bytes. `activations` is the most that a step holds beside all other parts.
        total: their sum.
        capacity: bytes of the GPU.
        longest_context: tokens of one pass that still fit (of the model's own context at the most); 0 if none does.
        strategy: `"one GPU"`, `"data parallel"`, `"FSDP 2"` or `"tensor parallel"`.
        command: launch line.
        notes: assumptions of the figures, and parts that they leave out.
    """

    parts: dict[str, float]
    total: float
    capacity: float
    context: int
    longest_context: int
    strategy: str
    command: str
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """True if the parts together fit in one GPU."""
        return self.total <= self.capacity

    def tables(self) -> list[Any]:
        """Return the parts as a `rich` table, then the verdict, the launch line and the notes."""
        table = Table("part", "GiB", title=f"one GPU, {self.context:,} tokens a pass, {self.strategy}")
        table.columns[1].justify = "right"
        for name, size in self.parts.items():
            table.add_row(name, f"{size / GIB:.2f}")
        table.add_row("[bold]total", f"[bold]{self.total / GIB:.2f}")
        verdict = "fits" if self.fits else "does not fit"
        lines = [f"{verdict} in {self.capacity / GIB:.0f} GiB; longest context: {self.longest_context:,} tokens a pass"]
        return [table, *lines, "", self.command, *(f"note: {note}" for note in self.notes)]


class _Peak(TorchDispatchMode):
    """A mode that counts the bytes of the storages that operators make, while they live."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: Any = WeakIdKeyDictionary()
        for tensor in known:
            self._seen[tensor.untyped_storage()] = 0

    def _freed(self, size: int) -> None:
        self.live -= size

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in self._seen:
                storage = tensor.untyped_storage()
                self._seen[storage] = storage.nbytes()
                self.live += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result


@dataclass(frozen=True)
class _Mode:
    """The work of a run: a step of an objective, or inference.

    Args:
        objective: None for inference.
        restricted: with restricted gradients.
    """

    objective: type[Objective] | None
    restricted: bool = False

    @property
    def through_layers(self) -> bool:
        """True if gradients flow from layer to layer: then activations can be recomputed, and FSDP can shard."""
        return self.objective is not None and not self.restricted

    def step(self, model: Any, tokens: int) -> Any:
        """Run on one sample of `tokens` tokens; return what is held at the end."""
        if self.objective is not None:
            return self.objective.trial_step(model, tokens, self.restricted)
        ids = torch.zeros(1, tokens, dtype=torch.long)
        with torch.no_grad():
            return layer_masses(model, input_ids=ids, key_groups=ids, query_positions=torch.full((1, 1), tokens - 1))

    def options(self) -> list[str]:
        """Return the options of `abft train`."""
        assert self.objective is not None
        method = [] if self.objective.name == DEFAULT else [f"--method {self.objective.name}"]
        return [*method, *(["--restricted_gradient True"] if self.restricted else [])]


def _modes() -> dict[str, _Mode]:
    return {**{name: _Mode(*found) for name, found in plan_modes().items()}, "inference": _Mode(None)}


def modes() -> tuple[str, ...]:
    """Return the modes that can be planned."""
    return tuple(_modes())


def _activations(model: Any, tokens: int, mode: _Mode) -> int:
    """Return the most bytes that a step holds beside weights and gradients."""
    for parameter in model.parameters():
        parameter.grad = None
    with _Peak([*model.parameters(), *model.buffers()]) as peak:
        mode.step(model, tokens)
    gradients = sum(p.grad.untyped_storage().nbytes() for p in model.parameters() if p.grad is not None)
    return peak.peak - gradients


def _weights(model: Any, precision: str) -> tuple[float, float]:
    """Return the bytes of the weights in memory, and of the largest that is unpacked at a time."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    packed, largest = 0.0, 0.0
    if precision == "nf4":
        for module in model.modules():
            if isinstance(module, nn.Linear) and module is not head and "lora" not in type(module).__name__.lower():
                size = module.weight.untyped_storage().nbytes()
                if not module.weight.requires_grad:
                    packed += size - module.weight.numel() * NF4_BYTES
                    largest = max(largest, size)
    storages = {id(x.untyped_storage()): x.untyped_storage().nbytes() for x in (*model.parameters(), *model.buffers())}
    return sum(storages.values()) - packed, largest


def plan(
    model: str,
    *,
    context: int = 2048,
    mode: str = "full",
    precision: str = "bfloat16",
    lora: bool = False,
    lora_r: int = 16,
    gradient_checkpointing: bool = False,
    gpus: int = 1,
    gpu_memory: float = 80.0,
) -> Plan:
    """Plan a run with passes of `context` tokens: one prompt, or packed prompts.

    Args:
        model: model folder, its `config.json`, or a name on the Hugging Face Hub.
        context: tokens of a pass.
        mode: `"full"` or `"restricted"` gradients of ABFT, `"e2e"`, `"e2e_qk"`, `"inference"` (evaluation), or a mode
            of an objective that was registered; see :func:`modes`.
        precision: of the base: `"float32"`, `"bfloat16"`, `"float16"`, or `"nf4"` (with LoRA).
        lora, lora_r: adapters on q and k in place of W_Q and W_K; their rank.
        gradient_checkpointing: recompute each layer in the backward pass.
        gpus, gpu_memory: number of GPUs, and GiB of each.

    Raises:
        ValueError: an option outside its range, or a context beyond the model's.
        OSError: no such configuration.
        NotImplementedError: a model that the attention does not serve.
    """
    for name, value, allowed in (("mode", mode, modes()), ("precision", precision, tuple(DTYPES))):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    if context < 2 or gpus < 1 or gpu_memory <= 0:
        raise ValueError(
            f"context (2 or more), gpus (1 or more) and gpu_memory (GiB) must be positive, got {context}, {gpus} and "
            f"{gpu_memory}"
        )
    config = load_config(model)
    limit = context_of(config) or 1 << 20
    run = _modes()[mode]
    if context > limit:
        raise ValueError(f"context={context} is beyond the model's {limit} tokens; lower it")
    checkpointed = gradient_checkpointing and run.through_layers
    lora = lora or precision == "nf4"
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION, dtype=DTYPES[precision])
        check_architecture(base)
        scope = "qk" if run.objective is None else run.objective.trains
        if lora and scope == "model":
            raise ValueError(f"mode={mode!r} trains the whole model; leave lora and nf4 off")
        whole: Any = lora_qk(base, r=lora_r, head=scope == "qk_head") if lora else base
    if not lora and run.objective is not None:
        float32_masters(base, train_parameters(base, scope), "cpu")
    with FakeTensorMode(allow_non_fake_inputs=True):
        whole.to_empty(device="cpu")
        whole.train(run.objective is not None)
        if checkpointed:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        weights, unpacked = _weights(base, precision)
        trained = sum(p.numel() * p.element_size() for p in whole.parameters() if p.requires_grad)
        layers = config.get_text_config().num_hidden_layers
        # Linear in the tokens from some hundreds on; two points give the line.
        low, high = min(context, 1024), min(max(context, 2048), limit)
        try:
            at_low, at_high = (_activations(whole, tokens, run) for tokens in (low, high))
            here = at_high if context == high else _activations(whole, context, run)
        except RuntimeError as error:  # operators that PyTorch has no shapes for: mixtures of experts in float32
            raise NotImplementedError(
                f"PyTorch cannot run {type(base).__name__} in {precision} on shapes alone ({error}); try bfloat16"
            ) from error
    slope = (at_high - at_low) / max(1, high - low)
    kept = 0.0 if run.objective is None else 3.0 * trained  # gradient, and Adam's two moments
    strategy, split = _strategy(run, gpus, weights + kept + here + unpacked + RESERVED, gpu_memory * GIB)
    gathered = 2 * weights / layers if strategy == "FSDP 2" else 0.0  # a layer in use, and the next one
    parts = {
        "weights": weights / split,
        "gradients and Adam": kept / split,
        "activations": float(here),
        "4-bit weights unpacked": unpacked,
        "layers gathered": gathered,
        "CUDA context, allocator": RESERVED,
    }
    parts = {name: size for name, size in parts.items() if size}
    total = sum(parts.values())
    free = gpu_memory * GIB - (total - here)
    longest = min(limit, int(context + (free - here) / max(slope, 1e-9))) if free > 0 else 0
    notes = [f"the {RESERVED / GIB:.1f} GiB of CUDA context and allocator are assumed, the rest is counted"]
    if strategy == "tensor parallel":
        notes.append("activations counted as on one GPU, though heads are split: the longest context is longer")
    if limit <= longest:
        notes.append(f"the longest context is the model's own ({limit:,})")
    command = _command(model, run, precision, lora, checkpointed, context, strategy, gpus)
    return Plan(parts, total, gpu_memory * GIB, context, max(0, longest), strategy, command, tuple(notes))


def _strategy(mode: _Mode, gpus: int, alone: float, capacity: float) -> tuple[str, int]:
    """Return how several GPUs share the work, and the number of parts that the weights are split into."""
    if gpus == 1:
        return "one GPU", 1
    if alone <= capacity:
        return "data parallel", 1
    return ("FSDP 2", gpus) if mode.through_layers else ("tensor parallel", gpus)


def _command(
    model: str, mode: _Mode, precision: str, lora: bool, checkpointed: bool, context: int, strategy: str, gpus: int
) -> str:
    """Return the launch line, without the data."""
    start = "abft" if gpus == 1 else f"torchrun --nproc_per_node {gpus} -m abft.cli"
    if mode.objective is None:
        return f"{start} eval --model {model} …"
    # Under FSDP all processes must take as many passes.
    passes = "--per_device_train_batch_size 1" if strategy == "FSDP 2" else f"--tokens_per_batch {context}"
    options = [f"--packing True {passes}"]
    options += mode.options()
    options += ["--lora True"] if lora else []
    options += ["--load_in_4bit True"] if precision == "nf4" else [f"--dtype {precision}"]
    if checkpointed:
        options.append("--gradient_checkpointing True --gradient_checkpointing_kwargs '{\"use_reentrant\": false}'")
    if strategy == "FSDP 2":
        options.append('--fsdp full_shard --fsdp_config \'{"version": 2, "state_dict_type": "FULL_STATE_DICT"}\'')
    if strategy == "tensor parallel":
        options.append(f"--tensor_parallel_size {gpus}")
    return f"{start} train --model {model} {' '.join(options)} …"
