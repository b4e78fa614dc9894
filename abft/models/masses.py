"""Forward passes that give attention masses: the whole model's, or only what the masses need.

`attention_mass` and `forward_with_mass` run the model as it is. `layer_masses` is the pass that training takes: no LM
head, nothing behind the last layer's scores, and on request each layer's mass is used and freed as soon as it exists.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from packaging.version import Version
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from abft.models.attention import MassCollector, StopForward, check_architecture, is_enabled, transformer_of
from abft.models.context_parallel import ContextParallel

__all__ = ["attention_mass", "forward", "forward_with_mass", "layer_masses"]

# Before 5.3 some language-model heads (GPT-2's) do not hand unknown arguments down to the decoder.
_HEADS_PASS_ARGUMENTS = Version(transformers.__version__) >= Version("5.3")


def attention_mass(
    model: nn.Module,
    input_ids: Tensor,
    key_groups: Tensor,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    query_positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_groups: int = 2,
    **kwargs: Any,
) -> tuple[Tensor, ...]:
    """How much each head looks at groups of tokens: one mass `(B, H, R, G)` per layer, float32, with gradient.

    Args:
        model: a causal language model on the `"abft"` attention (see :func:`enable`).
        input_ids: `(B, N)`.
        key_groups: integers `(B, N)`: −1 for no group, else 0 … `num_groups` − 1.
        attention_mask: `(B, N)`, 1 for tokens; padding on either side.
        position_ids: `(B, N)`; counted from each sample's first token if None and padded.
        query_positions: `(B, R)` indices of the rows wanted; None for all N.
        cu_seqlens: bounds `(S + 1,)` of S prompts packed one behind the other in a batch of one, from 0 to N; in place
            of `attention_mask`. Then `query_positions` is `(S, R)`, positions in the packed order, and so are masses.
        num_groups: G.
        kwargs: handed to `model(...)`.

    Raises:
        ValueError: the model runs on another attention, or its checkpointing loses the masses' gradients.
        NotImplementedError: a layer's attention does not come through the interface.
    """
    outputs = forward_with_mass(
        model, input_ids=input_ids, key_groups=key_groups, attention_mask=attention_mask, position_ids=position_ids,
        query_positions=query_positions, cu_seqlens=cu_seqlens, num_key_groups=num_groups, **kwargs,
    )  # fmt: skip
    return outputs.attentions


def forward_with_mass(
    model: nn.Module,
    *,
    input_ids: Tensor,
    key_groups: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
    query_positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """`model(...)` with `outputs.attentions` holding the masses of every layer; logits of one position only."""
    inner = _ready(model)
    asked, position_ids = _arguments(
        input_ids,
        key_groups,
        attention_mask,
        position_ids,
        query_positions,
        cu_seqlens,
        kwargs.pop("num_key_groups", 2),
    )
    num_key_groups = asked["num_key_groups"]
    kwargs = {"output_attentions": True, "use_cache": False, "logits_to_keep": 1, **kwargs}
    arguments = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids, **kwargs}
    outputs = _call(model, inner, arguments, asked)
    masses = getattr(outputs, "attentions", None) or ()
    expected = inner.config.get_text_config().num_hidden_layers
    rows = input_ids.shape[1] if query_positions is None else query_positions.shape[1]
    shape = (rows, num_key_groups)
    got = sum(mass is not None and mass.dim() == 4 and mass.shape[2:] == shape for mass in masses)
    if not len(masses) == got == expected:
        raise NotImplementedError(
            f"{type(inner).__name__} gave a mass for {got} of {expected} layers: some of its attention does not go "
            "through transformers' AttentionInterface"
        )
    _unshard_on_gradient(inner, masses)
    return outputs


def forward(
    model: nn.Module,
    *,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """`model(...)` without masses or a cache, for padded or packed prompts alike (arguments as :func:`attention_mass`).

    Raises:
        ValueError: as there.
    """
    asked = {}
    if cu_seqlens is not None:
        _ready(model)
        asked["cu_seq_lens_q"] = cu_seqlens.to(torch.int32)
        position_ids = _packed_positions(cu_seqlens, input_ids, attention_mask)
    arguments = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
    return _call(model, transformer_of(model), {**arguments, "use_cache": False, **kwargs}, asked)


def _unshard_on_gradient(inner: PreTrainedModel, masses: tuple[Tensor, ...]) -> None:
    """Under FSDP 2, brings a layer's parameters back when the gradient reaches it through its mass.

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
    cu_seqlens: Tensor | None = None,
    num_groups: int = 2,
    detach: bool = False,
    on_mass: Callable[[Tensor], Tensor] | None = None,
    context_group: Any = None,
) -> tuple[Tensor, ...]:
    """The masses of :func:`attention_mass` from the decoder alone, ending where nothing more is needed.

    The LM head does not run, nor anything behind the last layer's scores; with gradient checkpointing, or accelerate's
    hooks, which need every module to run, what follows in the last layer runs on zeros. Under a wrapper (DDP, FSDP,
    `torch.compile`) the whole model runs, with the logits of one position.

    Args:
        model, input_ids, key_groups, attention_mask, position_ids, query_positions, cu_seqlens, num_groups: as there.
        detach: a layer's mass carries gradient to its own W_Q and W_K only: attention outputs are detached. With all
            other parameters frozen, no activation outlives its layer ("restricted gradient").
        on_mass: called with each layer's mass as it is computed; what it returns is kept in the mass's place. With
            `detach` it may call `backward` and return the detached mass: then no graph outlives the layer either.
        context_group: a process group that shares the context (context parallelism, see
            `abft.models.context_parallel`): every process passes all tokens and gets all masses. Prompts of one length,
            without padding before them.

    Raises:
        ValueError: the model runs on another attention, its checkpointing loses the masses' gradients, `detach` with
            gradient checkpointing, which it makes needless, or `detach`, `on_mass` or `context_group`
            under a wrapper.
        NotImplementedError: a layer's attention does not come through the interface; PEFT prompt tokens; a spread
            context with padding, packed prompts or all rows.
    """
    inner = _ready(model)
    checkpointed = bool(_checkpoint_functions(inner))
    if detach and checkpointed:
        raise ValueError(
            "restricted gradients keep no activations, so gradient checkpointing has nothing to save; switch it off"
        )
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise NotImplementedError(f"PEFT's {model.peft_type} adds prompt tokens, which have no key groups; use LoRA")
    if not isinstance(model, (PreTrainedModel, PeftModel)) or isinstance(model, FSDPModule):
        if detach or on_mass is not None or context_group is not None:
            raise ValueError(f"unwrap the model first: {type(model).__name__} waits for a backward pass of its own")
        outputs = forward_with_mass(
            model, input_ids=input_ids, key_groups=key_groups, attention_mask=attention_mask, position_ids=position_ids,
            query_positions=query_positions, cu_seqlens=cu_seqlens, num_key_groups=num_groups,
        )  # fmt: skip
        return outputs.attentions
    asked, position_ids = _arguments(
        input_ids, key_groups, attention_mask, position_ids, query_positions, cu_seqlens, num_groups
    )
    context = None
    if context_group is not None:
        padded = attention_mask is not None and not attention_mask.all()
        if padded or cu_seqlens is not None or query_positions is None:
            raise NotImplementedError(
                "a context spread over processes takes prompts of one length, not padded nor packed, and chosen rows"
            )
        context = ContextParallel(context_group, input_ids.shape[1])
        position_ids = context.positions(input_ids.shape[0], input_ids.device)
        asked["key_groups"] = context.part(key_groups, -1)
        input_ids, attention_mask = context.part(input_ids, 0), None
    hooked = any(hasattr(module, "_hf_hook") for module in inner.modules())
    layers = inner.config.get_text_config().num_hidden_layers
    stop = not checkpointed and not hooked
    collector = MassCollector(layers, stop=stop, detach=detach, on_mass=on_mass, context=context)
    shared = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids,
              "use_cache": False, **asked}  # fmt: skip
    try:
        inner.base_model(**shared, mass_collector=collector)
    except StopForward:
        pass
    finally:
        collector.closed = True
    if len(collector.masses) != layers:
        raise NotImplementedError(
            f"{type(inner).__name__} gave a mass for {len(collector.masses)} of {layers} layers: some of its attention "
            "does not go through transformers' AttentionInterface"
        )
    return tuple(collector.masses)


def _call(model: nn.Module, inner: PreTrainedModel, arguments: dict[str, Any], asked: dict[str, Any]) -> Any:
    """`model(...)`, with what the attention is asked for brought down to the decoder."""
    if _HEADS_PASS_ARGUMENTS or not asked:
        return model(**arguments, **asked)
    hook = inner.base_model.register_forward_pre_hook(_adding(asked), with_kwargs=True)
    try:
        return model(**arguments)
    finally:
        hook.remove()


def _ready(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside, or an error if masses cannot come out of it."""
    inner = transformer_of(model)
    if not is_enabled(inner):
        raise ValueError(
            f"the model runs on attn_implementation={inner.config.get_text_config()._attn_implementation!r}; "
            "call abft.enable(model) first"
        )
    check_architecture(inner)  # the name can also be set while loading
    _check_checkpointing(inner)
    return inner


def _arguments(
    input_ids: Tensor, key_groups: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None,
    query_positions: Tensor | None, cu_seqlens: Tensor | None, num_groups: int,
) -> tuple[dict[str, Any], Tensor | None]:  # fmt: skip
    """What the attention is asked for, and the positions of the tokens."""
    asked = {"key_groups": key_groups, "num_key_groups": num_groups, "query_positions": query_positions}
    if cu_seqlens is not None:
        asked["cu_seq_lens_q"] = cu_seqlens.to(torch.int32)
        position_ids = _packed_positions(cu_seqlens, input_ids, attention_mask)
    elif position_ids is None and attention_mask is not None:
        position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    return asked, position_ids


def _packed_positions(cu_seqlens: Tensor, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Positions `(1, N)` of the tokens in their own sequences."""
    if attention_mask is not None:
        raise ValueError("cu_seqlens and attention_mask exclude each other: packed prompts have no padding")
    if input_ids.shape[0] != 1 or int(cu_seqlens[-1]) != input_ids.shape[1]:
        raise ValueError(
            f"cu_seqlens ends at {int(cu_seqlens[-1])}; input_ids must be one packed row of as many tokens, got shape "
            f"{tuple(input_ids.shape)}"
        )
    lengths = cu_seqlens.diff().long()
    tokens = torch.arange(input_ids.shape[1], device=input_ids.device)
    return (tokens - cu_seqlens[:-1].long().repeat_interleave(lengths))[None]


def _checkpoint_functions(inner: PreTrainedModel) -> list[Any]:
    """What the modules of the model checkpoint themselves with, in a pass that is trained."""
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


def _adding(arguments: dict[str, Any]) -> Any:
    return lambda module, args, kwargs: (args, {**kwargs, **arguments})
