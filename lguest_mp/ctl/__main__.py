"""``python -m lguest_mp.ctl`` is ``lguestctl``."""

import sys

from lguest_mp.ctl.cli import main

if __name__ == "__main__":
    sys.exit(main())
