"""`python -m fastskel` is the command line."""

import sys

from fastskel.cli import main

sys.exit(main())
