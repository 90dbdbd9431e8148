"""`python -m tests.reliability PART`: the command line of the campaign."""

import sys

from .runner import main

if __name__ == "__main__":
    sys.exit(main())
