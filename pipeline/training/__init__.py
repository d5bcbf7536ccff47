"""One training loop for all tasks, with checkpoints that are committed atomically and resume exactly."""
