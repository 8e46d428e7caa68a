"""What takes how long, and how much memory: the measurements behind docs/benchmarks."""
