"""A page on this machine to try a classifier on."""
