"""Experiments of the paper's evaluation: methods × tasks × seeds, their analysis and reports."""
