"""``lguestctl``: what people do with guests that run.

One chapter each:

- ``cli``: the command line, and one line for each thing that goes wrong;
- ``client``: finding a guest, and asking its supervisor;
- ``samples``: what the host says of its processes, beside what the supervisor says;
- ``tables``, ``listing``: columns for people; ``list``, ``ps``, ``jail``;
- ``top``: the same, live;
- ``stats``: the same for programs, as JSON and for Prometheus;
- ``log``: what the launcher said;
- ``console``: looking at the guest's console, and typing;
- ``orders``: ``stop``, ``reboot``, ``restart``, ``reset``;
- ``completion``: what a shell can complete.

The supervisor only says what nobody else knows; everything that takes time is done here, in lguestctl's own process.
"""
