"""Scripts that make the results in docs/ again, each one command."""
