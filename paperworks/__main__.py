"""`python -m paperworks` is the command `paperworks`."""

import sys

from paperworks.cli.main import main

sys.exit(main())
