"""What is recorded of a training, and the rules that judge it."""
