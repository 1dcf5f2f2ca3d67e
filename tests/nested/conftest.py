"""What runs in here takes a quarter of an hour, and more on a busy machine, so it runs when somebody asks for it:
``LGUEST_TEST_NESTED=1 tools/test tests/nested``.
"""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("LGUEST_TEST_NESTED") else ["test_*.py"]
