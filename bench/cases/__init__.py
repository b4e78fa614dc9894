"""Cases of `python -m bench` that need no GPU."""
