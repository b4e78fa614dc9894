"""The command line `abft`."""
