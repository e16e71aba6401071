"""`python -m apportion`: the command line."""

import sys

from apportion.cli import main

sys.exit(main())
