"""Differentiable attention mass: how much each query looks at chosen groups of keys, without an N × N tensor."""

from abft_kernels._version import __version__
from abft_kernels.functional import Backend, attention, available_backends, mass_attention, merge_masses, row_mass
from abft_kernels.reference import gather_rows, mass_attention_reference, row_mass_reference

__all__ = [
    "Backend",
    "__version__",
    "attention",
    "available_backends",
    "gather_rows",
    "mass_attention",
    "mass_attention_reference",
    "merge_masses",
    "row_mass",
    "row_mass_reference",
]
