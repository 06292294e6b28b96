"""From a journal to MLflow runs and figures."""
