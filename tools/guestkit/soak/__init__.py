"""Guests that are maltreated for a long time, and lose nothing: what ``tools/soak`` runs, and the tests in short.

A soak is a function from a :class:`Room`, which has what guests are made of, and a :class:`Plan` to a :class:`Report`.
It raises an AssertionError when a promise is broken. All that is random comes from the plan's seed.
"""

from __future__ import annotations

from guestkit.soak.enemy import hostile
from guestkit.soak.growth import reboots, reboots_in_place, resets
from guestkit.soak.network import link, tap, user
from guestkit.soak.plan import Plan, Report, Room, Soak
from guestkit.soak.workers import console, disk, rng

#: By the name that ``tools/soak`` takes: a soak and how long it goes on if nothing is said.
SOAKS: dict[str, Soak] = {
    "disk": Soak(disk, times=1000),
    "tap": Soak(tap, times=200),
    "user": Soak(user, times=200),
    "link": Soak(link, times=200),
    "rng": Soak(rng, times=200),
    "console": Soak(console, times=200),
    "reboots": Soak(reboots, times=100),
    "reboots-in-place": Soak(reboots_in_place, times=100),
    "resets": Soak(resets, times=1000),
    "hostile": Soak(hostile, seconds=600),
}

__all__ = ["SOAKS", "Plan", "Report", "Room", "Soak"]
