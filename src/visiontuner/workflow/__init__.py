"""One module a verb: what the command line calls, and Python."""
