"""Epochs over feature vectors, and the numbers they give."""
