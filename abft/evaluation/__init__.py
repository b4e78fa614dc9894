"""Evaluation of models on prompts and targets, and the tests of the paper."""
