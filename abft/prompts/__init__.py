"""Tasks, labelled texts, prompts and attention targets, and their batches."""
