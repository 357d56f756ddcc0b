"""`python -m sparsemem`."""

import sys

from sparsemem.cli.app import main

sys.exit(main())
