"""Models on the `"abft"` attention: masses, what is trained of them, and how they are loaded and kept."""
