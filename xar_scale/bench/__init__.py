"""Time and memory measurements behind docs/benchmarks."""
