"""``python -m speechbrain_ext``."""

import sys

from speechbrain_ext.cli import main

if __name__ == "__main__":
    sys.exit(main())
