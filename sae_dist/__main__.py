"""`python -m sae_dist COMMAND` is `sae-dist COMMAND`."""

import sys

from sae_dist.cli.main import main

sys.exit(main())
