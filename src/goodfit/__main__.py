"""`python -m goodfit` is `goodfit`."""

import sys

from goodfit.cli.main import main

sys.exit(main())
