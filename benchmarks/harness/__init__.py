"""What the benchmark scripts share: the two sides, each in its own process, and the timing."""
