"""What the compiler makes of the kernels, and the launch table that is chosen by it."""
