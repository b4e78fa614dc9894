"""Studies of in-context learning: what its heads do, and how far it is a fine-tuning in disguise.

`abft.analysis.heads` finds induction and retrieval heads, `abft.analysis.implicit` compares in-context learning with
fine-tuning on the demonstrations, and tries momentum attention.
"""
