"""What a training records of itself beside its metrics: tensors, step times, use of the machine."""
