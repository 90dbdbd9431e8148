"""`python -m qatkernels` is the `qatkernels` command."""

import sys

from .cli import main

sys.exit(main())
