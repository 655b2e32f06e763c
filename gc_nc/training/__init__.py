"""Training runs: configuration, steps, evaluation, checkpoints, logs and the loop over them."""
