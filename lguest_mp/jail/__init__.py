"""What a process of a guest may still do.

Two things are meant by it. A *confinement* is the user's choice, another root directory (``--chroot``) and another user
(``--username``), and holds for every process, the supervisor too (``confinement.py``). The *jail* holds for those that
serve the guest, whoever they run as: each worker, and the machine. It assumes that the guest has broken out: that what
executes in such a process is the attacker's code. What it can do then is meant to be this, and no more: write the
guest's memory, and use the files that the process holds, as it used them before.

Before the guest's first instruction, or a worker's first look at the guest, a process enters it, in this order:

1. Its files are closed but for those that it needs (``supervisor/children.py``).
2. No new privileges (``privileges.py``), which the next step asks for.
3. No file system, no TCP, no signals to others (``landlock.py``).
4. Limits (``limits.py``).
5. No capabilities (``privileges.py``).
6. Few system calls (``seccomp.py``, ``calls.py``).

What is needed beyond what all need, each device says of each of its queues, and each machine of itself
(:class:`~lguest_mp.jail.needs.Needs`). A :class:`Jail` knows what the host has of all this, and makes a :class:`Plan`
of it before anything is forked. What the host does not have is said once, and gone without; what it has and then
refuses is an error. ``report.py`` looks at a process from outside and tells what holds.
"""

from __future__ import annotations

from lguest_mp.jail.confinement import Confinement, User, prepare
from lguest_mp.jail.plan import Jail, Plan

__all__ = ["Confinement", "Jail", "Plan", "User", "prepare"]
