"""Training: tasks, optimizer, checkpoints and the loop."""
