"""Training runs: steps, checkpoints, reports and results."""
