"""Side-by-side measurements, run by tools/benchmark.py; nothing of the benchmark imports them."""
