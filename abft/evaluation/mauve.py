"""MAUVE (Pillutla et al., arXiv 2102.01454): whether training changed what a model writes.

Both models continue the same prefixes; MAUVE compares the two sets of texts by features of a third model. The library
`mauve-text` (extra `abft[mauve]`) is under the GPL 3; it is imported only when this is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from rich.progress import track
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, PreTrainedTokenizerBase

from abft.evaluation.batching import evaluation_mode
from abft.models.loading import context_of, default_device, load_tokenizer
from abft.prompts.collation import padding_id

__all__ = ["check_mauve", "continuations", "mauve_score"]


def check_mauve() -> None:
    """Raise ValueError if mauve-text is missing."""
    if find_spec("mauve") is None:
        raise ValueError("MAUVE needs mauve-text (GPL-3.0): pip install 'abft[mauve]'")


def continuations(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prefixes: Sequence[str],
    *,
    n: int = 256,
    new_tokens: int = 64,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> list[str]:
    """Return n sampled continuations (temperature 1), each with its prefix; the prefixes are repeated in turn.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        prefixes: at least one, each of a token or more.
        n: number of texts.
        new_tokens: tokens of each continuation.
        batch_size: texts generated at once.
        seed: seed of the draws, which leave PyTorch's own generator as it was.

    Raises:
        ValueError: no prefixes, or an empty one.
    """
    if not prefixes or any(not tokenizer(prefix).input_ids for prefix in prefixes):
        raise ValueError(f"prefixes must be one or more texts of a token or more, got {list(prefixes)!r}")
    device = next(model.parameters()).device
    filler = padding_id(tokenizer)
    sampling = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "max_new_tokens": new_tokens}
    texts = []
    with torch.random.fork_rng(), evaluation_mode(model):
        torch.manual_seed(seed)
        order = [prefixes[index % len(prefixes)] for index in range(n)]
        for start in track(range(0, n, batch_size), description="Writing", disable=not progress):
            rows = [torch.tensor(tokenizer(prefix).input_ids) for prefix in order[start : start + batch_size]]
            # On the left, whatever the tokenizer's own side is.
            ids = pad_sequence(rows, batch_first=True, padding_value=filler, padding_side="left")
            mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
            written = model.generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), pad_token_id=filler, **sampling
            )
            texts += tokenizer.batch_decode(written, skip_special_tokens=True)
    return texts


def _features(texts: Sequence[str], feature_model: str, batch_size: int, progress: bool) -> Tensor:
    """Return the last hidden state of the last token of each text, fp32 `(n, d)`."""
    tokenizer = load_tokenizer(feature_model)
    model = AutoModel.from_pretrained(feature_model, dtype="auto").to(default_device())
    limit = context_of(model.config)
    features = []
    with evaluation_mode(model):
        for start in track(range(0, len(texts), batch_size), description="Reading", disable=not progress):
            for text in texts[start : start + batch_size]:
                ids = torch.tensor([tokenizer(text).input_ids[:limit]], device=model.device)
                features.append(model(input_ids=ids, use_cache=False).last_hidden_state[0, -1].float().cpu())
    return torch.stack(features)


def mauve_score(
    before: Sequence[str], after: Sequence[str], feature_model: str, *, batch_size: int = 32, progress: bool = True
) -> float:
    """Return MAUVE of two sets of texts: 1 if they cannot be told apart, near 0 if they share nothing.

    Args:
        before, after: equally many texts each.
        feature_model: a local folder or a name on the Hub; its last hidden state represents a text.

    Raises:
        ValueError: mauve-text is missing, or the numbers of texts differ.
    """
    check_mauve()
    if len(before) != len(after) or len(before) < 2:
        raise ValueError(f"MAUVE compares two sets of the same size, got {len(before)} and {len(after)} texts")
    from mauve import compute_mauve

    features = [_features(texts, feature_model, batch_size, progress).numpy() for texts in (before, after)]
    return float(compute_mauve(p_features=features[0], q_features=features[1], verbose=False).mauve)
