"""A campaign of random tests: many random cases of things that can go wrong. Each case can be run again by itself.

`python -m tests.reliability PART` runs a part from a checkout; docs/reliability.md has the commands and their figures.
"""
