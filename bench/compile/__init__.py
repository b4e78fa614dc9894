"""The compiler's output for the kernels, and the launch table chosen by it."""
