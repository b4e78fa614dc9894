"""`python -m abft.cli`: the command line, as `torchrun -m` starts it."""

import sys

from abft.cli.main import main

sys.exit(main())
