"""``python -m lguest_mp`` is ``lguest``."""

import sys

from lguest_mp.cli import main

if __name__ == "__main__":
    sys.exit(main())
