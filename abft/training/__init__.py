"""Training with ABFT or E2E, its options, and a plan of the memory that it takes."""
