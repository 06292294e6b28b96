"""The best trial as an MLflow model."""
