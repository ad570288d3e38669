"""The run: which checkpoints, which questions, in which order, by which engine."""
