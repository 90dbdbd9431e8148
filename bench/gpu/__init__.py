"""A GPU for a few minutes: what is taken along, two calls that lose nothing when they are killed, and the way home."""
