"""A small language model and a classification task that show ABFT at work within minutes, on a CPU."""
