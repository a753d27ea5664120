"""Where files are kept: a folder of this machine, an S3-compatible bucket, or whatever fsspec reaches."""
