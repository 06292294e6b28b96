"""Files, downloads, S3 and AWS: what talks to the world outside this process."""
