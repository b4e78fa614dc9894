"""Forward passes that give attention masses: the whole model's, or only what the masses need.

`attention_mass` and `forward_with_mass` run the model as it is. `layer_masses` is the pass that training takes: no LM
head, nothing after the last layer's scores, and on request each layer's mass is used and freed as soon as it exists.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from abft.models.attention import check_architecture, is_enabled, transformer_of
from abft.models.bounds import Bounds
from abft.models.collector import MassCollector, MassRequest, StopForward
from abft.models.context_parallel import ContextParallel
from abft.models.inputs import Inputs, learns_prompts
from abft.models.mixed_precision import computing

__all__ = ["attention_mass", "forward", "forward_with_mass", "layer_masses"]


def attention_mass(
    model: nn.Module,
    input_ids: Tensor,
    key_groups: Tensor,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    query_positions: Tensor | None = None,
    seq_lens: Tensor | None = None,
    seq_starts: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_groups: int = 2,
    **kwargs: Any,
) -> tuple[Tensor, ...]:
    """Return how much each head looks at groups of tokens: one mass `(B, H, R, G)` per layer, float32, with gradient.

    Args:
        model: a causal language model on the `"abft"` attention (see :func:`enable`).
        input_ids: `(B, N)`.
        key_groups: integers `(B, N)`: −1 for no group, else 0 … `num_groups` − 1.
        attention_mask: `(B, N)`, 1 for tokens; padding on either side. The model reads it back from the device once a
            pass; `seq_lens` says the same without that.
        position_ids: `(B, N)`; counted from each sample's first token if None and padded.
        query_positions: `(B, R)` indices of the rows wanted; None for all N.
        seq_lens: `(B,)` tokens of each padded sample, in place of `attention_mask`.
        seq_starts: `(B,)` first token of each sample, for padding on the left; None for 0.
        cu_seqlens: bounds `(S + 1,)` of S packed prompts (concatenated along the sequence, batch size 1), from 0 to N;
            in place of `attention_mask`. Then `query_positions` is `(S, R)`, positions in the packed order, and so are
            masses.
        num_groups: G.
        kwargs: handed to `model(...)`.

    Raises:
        ValueError: the model runs on another attention, its checkpointing loses the masses' gradients, or arguments
            exclude each other.
        NotImplementedError: a layer's attention does not come through the interface.
    """
    inputs = Inputs(input_ids, attention_mask, position_ids, seq_lens, seq_starts, cu_seqlens)
    request = MassRequest(key_groups, num_groups, query_positions).contiguous()
    return _outputs_with_mass(model, inputs, request, kwargs).attentions


def forward_with_mass(
    model: nn.Module,
    *,
    key_groups: Tensor,
    query_positions: Tensor | None = None,
    num_key_groups: int = 2,
    **arguments: Any,
) -> Any:
    """Return `model(...)` with `outputs.attentions` holding the masses of every layer; logits of one position only.

    The model may be a decoder without its head.

    Args:
        model, key_groups, query_positions: as for :func:`attention_mass`.
        num_key_groups: G.
        arguments: `input_ids` and, as there, where the tokens are; others are handed to `model(...)`.

    Raises:
        ValueError, NotImplementedError: as there.
    """
    inputs, others = Inputs.split(arguments)
    request = MassRequest(key_groups, num_key_groups, query_positions).contiguous()
    return _outputs_with_mass(model, inputs, request, others)


def forward(model: nn.Module, **arguments: Any) -> Any:
    """Return `model(...)` without masses or a cache, for padded or packed prompts alike.

    Args:
        model: a transformers model, possibly wrapped; a decoder without its head too. On any attention, but for packed
            prompts.
        arguments: `input_ids` and, as for :func:`attention_mass`, where the tokens are; others are handed to
            `model(...)`.

    Raises:
        ValueError: packed prompts on another attention, or arguments that exclude each other.
    """
    inputs, others = Inputs.split(arguments)
    if inputs.cu_seqlens is not None:
        _ready(model)
    with computing(model):
        return model(**{**inputs.keywords(model), "use_cache": False, **others})


def _outputs_with_mass(model: nn.Module, inputs: Inputs, request: MassRequest, others: dict[str, Any]) -> Any:
    inner = _ready(model)
    options = {"output_attentions": True, "use_cache": False, **others}
    if "logits_to_keep" in inspect.signature(inner.forward).parameters:  # a decoder without its head has no logits
        options = {"logits_to_keep": 1, **options}
    with computing(model):
        outputs = model(**inputs.keywords(model), **request._asdict(), **options)
    masses = getattr(outputs, "attentions", None) or ()
    expected = inner.config.get_text_config().num_hidden_layers
    rows = inputs.input_ids.shape[1] if request.query_positions is None else request.query_positions.shape[1]
    shape = (rows, request.num_key_groups)
    got = sum(mass is not None and mass.dim() == 4 and mass.shape[2:] == shape for mass in masses)
    if not len(masses) == got == expected:
        raise _masses_missing(inner, got, expected)
    _unshard_on_gradient(inner, masses)
    return outputs


def _unshard_on_gradient(inner: PreTrainedModel, masses: tuple[Tensor, ...]) -> None:
    """Under FSDP 2, bring a layer's parameters back when the gradient reaches it through its mass.

    FSDP waits for the gradient of a layer's output; a mass leaves the layer beside that.
    """
    for layers in inner.modules():
        if isinstance(layers, nn.ModuleList) and len(layers) == len(masses):
            for layer, mass in zip(layers, masses, strict=True):
                if isinstance(layer, FSDPModule) and mass.requires_grad:
                    mass.register_hook(_unsharding(layer))


def _unsharding(layer: FSDPModule) -> Callable[[Tensor], None]:
    def unshard(gradient: Tensor) -> None:
        layer.unshard()

    return unshard


def layer_masses(
    model: nn.Module,
    *,
    input_ids: Tensor,
    key_groups: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    query_positions: Tensor | None = None,
    seq_lens: Tensor | None = None,
    seq_starts: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_groups: int = 2,
    detach: bool = False,
    on_mass: Callable[[Tensor], Tensor] | None = None,
    context_group: Any = None,
) -> tuple[Tensor, ...]:
    """Return the masses of :func:`attention_mass` from the decoder alone, which stops where nothing more is needed.

    The LM head does not run, nor anything after the last layer's scores; with gradient checkpointing, or accelerate's
    hooks, which need every module to run, what follows in the last layer runs on zeros. Under a wrapper (DDP, FSDP,
    `torch.compile`) the whole model runs, with the logits of one position.

    Args:
        model, input_ids, key_groups, attention_mask, position_ids, query_positions, seq_lens, seq_starts, cu_seqlens,
            num_groups: as there.
        detach: a layer's mass carries gradient to its own W_Q and W_K only: attention outputs are detached. With all
            other parameters frozen, no activation outlives its layer ("restricted gradient").
        on_mass: called with each layer's mass as it is computed; what it returns is kept in the mass's place. With
            `detach` it may call `backward` and return the detached mass: then no graph outlives the layer either.
        context_group: a process group that shares the context (context parallelism, see
            `abft.models.context_parallel`): every process passes all tokens and gets all masses. Prompts of one length,
            without padding.

    Raises:
        ValueError: the model runs on another attention, its checkpointing loses the masses' gradients, `detach` with
            gradient checkpointing, which it makes needless, or `detach`, `on_mass` or `context_group`
            under a wrapper.
        NotImplementedError: a layer's attention does not come through the interface; PEFT prompt tokens; a spread
            context with padding, packed prompts or all rows.
    """
    inputs = Inputs(input_ids, attention_mask, position_ids, seq_lens, seq_starts, cu_seqlens)
    request = MassRequest(key_groups, num_groups, query_positions).contiguous()
    inner = _ready(model)
    checkpointed = bool(_checkpoint_functions(inner))
    if detach and checkpointed:
        raise ValueError(
            "restricted gradients keep no activations, so gradient checkpointing has nothing to save; switch it off"
        )
    if learns_prompts(model):
        raise NotImplementedError(f"PEFT's {model.peft_type} adds prompt tokens, which have no key groups; use LoRA")
    if not isinstance(model, (PreTrainedModel, PeftModel)) or isinstance(model, FSDPModule):
        if detach or on_mass is not None or context_group is not None:
            raise ValueError(f"unwrap the model first: {type(model).__name__} waits for a backward pass of its own")
        return _outputs_with_mass(model, inputs, request, {}).attentions
    layout, context = inputs.layout(), None
    if context_group is not None:
        _check_spread(inputs, request)
        context = ContextParallel(context_group, input_ids.shape[1])
        inputs = Inputs(
            context.part(input_ids, 0), position_ids=context.positions(input_ids.shape[0], input_ids.device)
        )
        request, layout = request._replace(key_groups=context.part(key_groups, -1)), Bounds()
    hooked = any(hasattr(module, "_hf_hook") for module in inner.modules())
    layers = inner.config.get_text_config().num_hidden_layers
    stop = not checkpointed and not hooked
    collector = MassCollector(layers, stop=stop, detach=detach, on_mass=on_mass, context=context)
    keywords = inputs.keywords(inner, layout)
    try:
        with computing(inner):
            inner.base_model(**keywords, **request._asdict(), use_cache=False, mass_collector=collector)
    except StopForward:
        pass
    finally:
        collector.closed = True
    if len(collector.masses) != layers:
        raise _masses_missing(inner, len(collector.masses), layers)
    return tuple(collector.masses)


def _check_spread(inputs: Inputs, request: MassRequest) -> None:
    """Raise unless a context can be spread over processes."""
    tokens = inputs.attention_mask
    if inputs.seq_lens is not None:
        tokens = inputs.seq_lens == inputs.input_ids.shape[1]
    padded = tokens is not None and not tokens.all()
    if padded or inputs.cu_seqlens is not None or request.query_positions is None:
        raise NotImplementedError(
            "a context spread over processes takes prompts of one length, not padded nor packed, and chosen rows"
        )


def _masses_missing(inner: PreTrainedModel, got: int, expected: int) -> NotImplementedError:
    return NotImplementedError(
        f"{type(inner).__name__} gave a mass for {got} of {expected} layers: some of its attention does not go "
        "through transformers' AttentionInterface"
    )


def _ready(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside, or raise an error if masses cannot come out of it."""
    inner = transformer_of(model)
    if not is_enabled(inner):
        raise ValueError(
            f"the model runs on attn_implementation={inner.config.get_text_config()._attn_implementation!r}; "
            "call abft.enable(model) first"
        )
    check_architecture(inner)  # the name can also be set while loading
    _check_checkpointing(inner)
    return inner


def _checkpoint_functions(inner: PreTrainedModel) -> list[Any]:
    """Return the functions that modules of the model checkpoint themselves with, in a pass that is trained."""
    if not (inner.training and torch.is_grad_enabled()):
        return []
    return [
        getattr(module, "_gradient_checkpointing_func", None)
        for module in inner.modules()
        if getattr(module, "gradient_checkpointing", False)
    ]


def _check_checkpointing(inner: PreTrainedModel) -> None:
    if any(getattr(function, "keywords", {}).get("use_reentrant") for function in _checkpoint_functions(inner)):
        raise ValueError(
            "reentrant gradient checkpointing loses the gradients of the masses; call "
            'model.gradient_checkpointing_enable({"use_reentrant": False}), or pass '
            'gradient_checkpointing_kwargs={"use_reentrant": False} to the trainer'
        )
