"""Training with an objective (ABFT, E2E, or another), its options, and a plan of its memory."""
