"""``python -m bench.gpu``."""

import sys

from .cli import main

sys.exit(main())
