"""Tasks of a running server under lm-eval, which is installed by who uses this."""
