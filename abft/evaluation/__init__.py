"""What a model predicts and attends to on prompts and targets, and the paper's tests of it."""
