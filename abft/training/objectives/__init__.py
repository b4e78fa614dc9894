"""Training objectives: what `--method` chooses among. A new one is a subclass in a file and its line in `registry`."""
