"""Studies of in-context learning: its heads, what training changed, and its likeness to fine-tuning.

`heads` finds induction and retrieval heads, `weight_change` measures what training did to W_Q and W_K, `implicit`
compares in-context learning with fine-tuning on the demonstrations, and `momentum_gain` tries momentum attention.
"""
