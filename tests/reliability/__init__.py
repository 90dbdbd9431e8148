"""A campaign against the library: many random cases of what could go wrong, each of which can be run again alone.

`python -m tests.reliability PART` runs a part from a checkout; docs/reliability.md has the commands and their figures.
"""
