"""Private names of other packages, each with its version range, its gain and its fallback."""
