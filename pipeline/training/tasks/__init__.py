"""What there is to learn: each task owns its model, loss and metrics."""
