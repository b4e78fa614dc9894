"""The analyses of `abft analyze`: one module each, and one line in `registry`."""
