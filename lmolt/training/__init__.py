"""Arguments, batches, losses, reference, the trainer and its checkpoints."""
