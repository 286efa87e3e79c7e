"""`python -m hrm_lm.commands NAME ...` is `hrm-lm NAME ...` where the package is not installed."""

import sys

from hrm_lm.commands.main import main

sys.exit(main())
