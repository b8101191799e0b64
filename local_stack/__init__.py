"""All services on this machine, as child processes: for `prad serve`, for benchmarks and for tests."""
