"""Cases of the kernel tests: their ids, the table of every feature, and what random cases are drawn from.

A case is its id: `B2-H4:2-N111x63-D60-G2-bf16-causal-left-bnhd-oml` has 4 query heads over 2 KV heads, 111 queries on
63 keys, left padding, inputs in flash-attn's (B, N, H, D) layout, and incoming gradients of out, mass and lse. Features
are named: `w20` a window, `k24` chunks, `c2.5` a soft cap, `V48` values of another head_dim, and those of `FEATURES`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

from abft_kernels.masking import Reach

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
_NUMBERS = {"B": "batch", "R": "rows", "D": "head_dim", "G": "groups", "V": "value_dim", "w": "window", "k": "chunk"}
_PADDING = ("left", "right", "empty")
_LAYOUTS = ("bnhd", "sliced", "strided", "expanded")
# sinks; alibi: slopes; packed: `batch` sequences in one; drop: dropout by a seed; wanted: a mask of rows; weighted: key
# weights in place of groups; shard: the keys are part of more, the queries stand before, in and after them; alone:
# mass of all rows without values; sparse: labelled keys are met last, of every third key as ever.
FEATURES = ("sinks", "alibi", "packed", "drop", "wanted", "weighted", "shard", "alone", "sparse")


@dataclass(frozen=True)
class Case:
    """One set of shapes and features; `Case.parse` reads an id."""

    batch: int = 1
    heads: int = 1
    kv_heads: int = 1
    n_q: int = 1
    n_k: int = 1
    rows: int = 0  # of the row op; 0 for the fused op
    head_dim: int = 16
    groups: int = 2
    dtype: str = "fp32"
    causal: bool = True
    padding: str | None = None  # "empty": right padding with a sample of no token
    layout: str = "bhnd"
    scale: float | None = None
    grads: str = "oml"  # of out, mass, lse; "O" is an expanded gradient (stride 0)
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    value_dim: int | None = None
    features: frozenset[str] = frozenset()

    def has(self, feature: str) -> bool:
        return feature in self.features

    @property
    def reach(self) -> dict[str, int]:
        """Return the keywords that limit how far back a row sees."""
        return {name: getattr(self, name) for name in Reach._fields if getattr(self, name)}

    @property
    def plain(self) -> bool:
        """Whether PyTorch's attention computes the output."""
        special = self.features & {"sinks", "alibi", "drop", "shard", "alone"}
        return not (self.rows or self.reach or self.softcap or special)

    @classmethod
    def parse(cls, text: str) -> Case:
        values: dict[str, Any] = {}
        for part in re.split(r"(?<!-s)-", text):
            if found := re.fullmatch(r"H(\d+)(?::(\d+))?", part):
                values["heads"], values["kv_heads"] = int(found[1]), int(found[2] or found[1])
            elif found := re.fullmatch(r"N(\d+)(?:x(\d+))?", part):
                values["n_q"], values["n_k"] = int(found[1]), int(found[2] or found[1])
            elif found := re.fullmatch(r"([A-Zwk])(\d+)", part):
                values[_NUMBERS[found[1]]] = int(found[2])
            elif found := re.fullmatch(r"s(-?\d+\.\d+)", part):
                values["scale"] = float(found[1])
            elif found := re.fullmatch(r"c(\d+\.\d+)", part):
                values["softcap"] = float(found[1])
            elif part in FEATURES:
                values["features"] = values.get("features", frozenset()) | {part}
            elif part in DTYPES:
                values["dtype"] = part
            elif part in ("causal", "full"):
                values["causal"] = part == "causal"
            elif part in _PADDING:
                values["padding"] = part
            elif part in _LAYOUTS:
                values["layout"] = part
            elif re.fullmatch(r"[oOml]+", part):
                values["grads"] = part
            else:
                raise ValueError(f"{part!r} in {text!r} says nothing")
        return cls(**values)


# N130 crosses tiles of every kernel; the second case of a feature combines it with others.
FUSED = {
    "packed": ["B3-H4:2-N130-D64-G2-bf16-causal-packed-oml", "B4-H2-N111-D32-G2-fp32-full-packed-bnhd-oml"],
    "window": ["B2-H4:2-N130-D64-G2-bf16-causal-w20-oml", "B2-H2-N63x130-D32-G2-fp32-causal-w45-left-oml",
               "B3-H2:1-N130-D32-G2-fp32-causal-w17-packed-oml", "B1-H2-N130x63-D32-G2-fp32-causal-w1-oml"],
    "chunk": ["B2-H4:2-N130-D64-G2-bf16-causal-k24-oml", "B2-H2-N63x130-D32-G2-fp32-causal-k45-left-oml",
              "B3-H2:1-N130-D32-G2-fp32-causal-k17-packed-oml", "B1-H2-N130x63-D32-G2-fp32-causal-k1-oml",
              "B1-H2:1-N111-D32-G2-fp32-causal-k40-w13-oml", "B1-H2-N63-D32-G2-fp32-causal-k63-oml",
              "B2-H2-N111-D32-G2-fp32-causal-k50-shard-oml", "B2-H2-N63x111-D32-G2-bf16-causal-k33-shard-left-w20-oml",
              "B2-H4:2-N2x300-D64-G2-bf16-causal-k90-left-oml", "B2-H2-N63-D32-G2-fp32-causal-k20-alone-empty-ml"],
    "softcap": ["B2-H4:2-N130-D64-G2-bf16-causal-c2.5-oml", "B1-H2:1-N111-D32-G2-fp32-causal-c0.7-s0.5-w40-oml"],
    "sinks": ["B2-H4:2-N130-D64-G2-bf16-causal-sinks-oml", "B2-H2-N63x111-D32-G2-fp32-causal-sinks-w20-left-oml",
              "B2-H2:1-N130x63-D32-G2-fp32-causal-sinks-empty-ml"],
    "alibi": ["B2-H4:2-N130-D64-G2-bf16-causal-alibi-oml", "B2-H2-N111-D32-G2-fp32-full-alibi-right-oml"],
    "value_dim": ["B2-H4:2-N111-D48-V32-G2-bf16-causal-left-oml", "B1-H2-N63-D192-V128-G2-bf16-causal-oml",
                  "B1-H2-N111-D16-V60-G2-fp32-full-bnhd-oml"],
    "head_dim": ["B1-H2:1-N63-D256-G2-bf16-causal-oml", "B1-H1-N35-D512-G2-bf16-causal-oml",
                 "B1-H1-N35-D320-V512-G1-fp16-full-om"],
    "dropout": ["B2-H4:2-N130-D64-G2-bf16-causal-drop-oml", "B2-H2-N63x111-D32-G2-fp32-causal-drop-left-oml",
                "B3-H2:1-N111-D32-G2-fp32-causal-drop-packed-w40-oml"],
    "rows": ["B2-H4:2-N130-D64-G2-bf16-causal-wanted-oml", "B3-H2-N111-D32-G2-fp32-causal-wanted-packed-m"],
    "groups": ["B2-H2:1-N130-D32-G16-fp32-causal-oml", "B1-H2-N111-D64-G11-bf16-full-om"],
    "weights": ["B2-H4:2-N130-D64-G2-bf16-causal-weighted-oml", "B2-H2-N111-D32-G5-fp32-causal-weighted-left-oml",
                "B3-H2:1-N111-D32-G3-fp32-full-weighted-packed-ml"],
    "shards": ["B2-H4:2-N130x63-D32-G2-fp32-causal-shard-oml", "B2-H2-N63x130-D32-G2-bf16-causal-shard-w50-left-oml",
               "B1-H2-N63x63-D32-G2-fp32-full-shard-alibi-oml"],
    "decoding": ["B2-H4:2-N1x300-D64-G2-bf16-causal-left-oml", "B1-H8:2-N3x400-D64-V32-G2-fp32-causal-sinks-w90-oml",
                 "B1-H4:2-N4x260-D32-G2-fp32-full-c3.0-alibi-weighted-oml"],
    "mass_only": ["B2-H4:2-N130-D64-G2-bf16-causal-alone-left-ml", "B3-H2:1-N111-D32-G2-fp32-causal-alone-packed-m",
                  "B1-H2-N63x111-D48-G3-fp32-causal-alone-sinks-c3.0-alibi-weighted-w30-ml"],
    "all": ["B3-H4:2-N111-D48-V32-G3-fp32-causal-packed-w40-c3.0-sinks-alibi-drop-wanted-weighted-oml",
            "B2-H4:2-N63x111-D64-V48-G2-bf16-causal-left-w40-c3.0-sinks-alibi-drop-wanted-oml"],
}  # fmt: skip
ROWS = {
    "packed": ["B3-H4:2-R1-N300-D64-G2-bf16-causal-packed-ml", "B4-H8:1-R7-N150-D32-G2-fp32-causal-packed-ml",
               "B2-H2-R5-N130-D32-G2-fp32-full-packed-bnhd-ml"],
    "window": ["B2-H4:2-R3-N300-D64-G2-bf16-causal-w20-ml", "B2-H8:1-R6-N130-D32-G2-fp32-causal-w45-left-ml"],
    "chunk": ["B2-H4:2-R3-N300-D64-G2-bf16-causal-k24-ml", "B2-H8:1-R6-N130-D32-G2-fp32-causal-k45-w30-left-ml",
              "B4-H8:1-R7-N150-D32-G2-fp32-causal-k9-packed-ml", "B2-H4:2-R6-N130-D32-G2-fp32-causal-k50-shard-ml",
              "B2-H2-R5-N130-D32-G2-fp32-causal-k33-shard-left-ml"],
    "softcap": ["B2-H4:2-R3-N300-D64-G2-bf16-causal-c2.5-ml", "B1-H2-R2-N111-D32-G2-fp32-causal-c0.7-s0.5-ml"],
    "sinks": ["B2-H4:2-R3-N300-D64-G2-bf16-causal-sinks-ml", "B2-H2-R4-N63-D32-G2-fp32-causal-sinks-left-w9-ml"],
    "alibi": ["B2-H4:2-R3-N300-D64-G2-bf16-causal-alibi-ml", "B2-H2-R5-N63-D32-G2-fp32-full-alibi-right-ml"],
    "head_dim": ["B1-H2:1-R2-N35-D512-G2-bf16-causal-ml", "B1-H1-R2-N35-D320-G2-fp32-causal-ml"],
    "groups": ["B2-H2:1-R3-N300-D32-G16-fp32-causal-ml", "B1-H4:1-R3-N300-D128-G9-bf16-causal-m"],
    "weights": ["B2-H4:2-R3-N300-D64-G2-bf16-causal-weighted-ml", "B2-H8:1-R9-N130-D32-G5-fp32-causal-weighted-left-ml",
                "B3-H2:1-R3-N130-D32-G3-fp32-causal-weighted-packed-ml"],
    "shards": ["B2-H4:2-R6-N130-D32-G2-fp32-causal-shard-ml", "B2-H2-R5-N130-D32-G2-bf16-causal-shard-w50-left-ml",
               "B1-H2-R5-N63-D32-G2-fp32-full-shard-alibi-ml"],
    "all": ["B3-H4:2-R4-N300-D48-G3-fp32-causal-packed-w40-c3.0-sinks-alibi-weighted-ml"],
}  # fmt: skip
# Limits that end at a border of tiles or beside it: blocks of keys and rows begin and end by them.
BORDERS = [f"N130-D16-G2-fp32-causal-oml-w{window}" for window in (1, 2, 31, 32, 33, 34, 63, 65)]
BORDERS += [f"N130-D16-G2-fp32-causal-oml-k{chunk}" for chunk in (2, 31, 32, 33, 64, 65, 129)]


def drawn(most: int, features: tuple[str, ...]):
    """Return a strategy of cases of at most `most` rows and keys; :func:`allowed` makes each one consistent."""
    return st.builds(
        lambda kv_heads, group, **rest: Case(heads=kv_heads * group, kv_heads=kv_heads, **rest),
        batch=st.integers(1, 3),
        kv_heads=st.integers(1, 2),
        group=st.integers(1, 3),
        n_q=st.integers(1, most),
        n_k=st.integers(1, most),
        head_dim=st.integers(1, 40),
        groups=st.integers(1, 16),
        dtype=st.sampled_from(["fp32", "bf16", "fp16"]),
        causal=st.booleans(),
        padding=st.sampled_from([None, "left", "right", "empty"]),
        grads=st.sampled_from(["oml", "m", "Ol"]),
        layout=st.sampled_from(["bhnd", "bnhd", "sliced", "strided", "expanded"]),
        softcap=st.none() | st.floats(0.5, 30.0),
        **dict.fromkeys(Reach._fields, st.none() | st.integers(1, most)),
        value_dim=st.none() | st.integers(1, 40),
        features=st.frozensets(st.sampled_from(features), max_size=4),
    )


def allowed(case: Case) -> Case:
    """Return the case without what excludes the rest of it."""
    changes: dict = {}
    if not case.causal:
        changes |= dict.fromkeys(Reach._fields)
    if case.has("packed"):
        changes |= {"padding": None, "features": case.features - {"shard"}, "n_q": case.n_k}
    elif case.padding and not case.causal and not case.rows and not case.has("shard"):
        changes["n_q"] = case.n_k
    if case.rows or case.has("alone"):
        changes |= {"value_dim": None, "grads": "ml"}
        changes["features"] = changes.get("features", case.features) - {"drop", "wanted"}
    if case.has("weighted"):
        changes["features"] = changes.get("features", case.features) - {"sparse"}
    return Case(**{**vars(case), **changes})
