"""Training tasks: each owns its model, loss and metrics."""
