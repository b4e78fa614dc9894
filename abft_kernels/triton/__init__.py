"""Triton kernels. Imported on first use, so that the package works where Triton does not."""
