"""The PyTorch backend: every feature, device and dtype, and no N × N tensor."""
