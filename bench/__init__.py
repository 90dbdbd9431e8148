"""Benchmarks that check before they time. Run as ``python -m bench`` from a checkout; see bench/README.md."""
