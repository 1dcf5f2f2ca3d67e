"""What all tests share: how hypothesis runs on machines of any speed."""

from __future__ import annotations

from hypothesis import settings

# How long an example takes says more about the machine than about the code.
settings.register_profile("lguest", deadline=None)
settings.load_profile("lguest")
