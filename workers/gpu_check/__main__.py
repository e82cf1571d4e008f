"""`python -m workers.gpu_check`."""

import sys

from workers.gpu_check.main import main

sys.exit(main())
