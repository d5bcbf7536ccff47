"""One training loop for all tasks, with checkpoints that appear whole and resume exactly."""
