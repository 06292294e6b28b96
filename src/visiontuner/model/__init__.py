"""Pretrained networks, their features, and the artifact that is served."""
