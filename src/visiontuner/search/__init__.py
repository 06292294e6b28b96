"""The search over hyperparameters with Ray Tune."""
