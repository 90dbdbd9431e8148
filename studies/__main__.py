"""``python -m studies NAME``."""

import sys

from .runner import main

sys.exit(main())
