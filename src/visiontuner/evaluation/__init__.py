"""Predictions and runs -> numbers and tables; pure, on numpy, with neither torch nor MLflow."""
