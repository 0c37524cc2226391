"""Benchmarks of fastsparse: cases, peers in processes of their own, ceilings of the machine, bars. See README.md."""
