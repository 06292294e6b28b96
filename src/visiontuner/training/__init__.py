"""Epochs over feature vectors and images, and the numbers they give."""
