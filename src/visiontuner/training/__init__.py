"""Epochs over feature vectors and pictures, and the numbers they give."""
