"""SageMaker: what an account needs, endpoints, and training jobs."""
