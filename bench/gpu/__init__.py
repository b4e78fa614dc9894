"""The suites of `python -m bench --gpu`."""
