"""Fine-tune an image classifier, see every trial in MLflow, and serve the best one."""
