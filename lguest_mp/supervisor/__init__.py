"""The parent of all processes of a guest: it prepares, forks, watches, and clears up. No threads, no guest code.

One chapter each, in the order in which a guest lives through them:

- ``parts``: which machine, kernel loader and devices a guest is made of;
- ``resources``: everything that can fail, opened and checked before anything is forked;
- ``signals``, ``children``: what the host tells us, and whom we start;
- ``guest``: the life of one guest, from its first instruction to its end, as an explicit state machine;
- ``ending``: the ways in which it ends, with the line and the exit status of each;
- ``reboot``: starting afresh, by exec or in place;
- ``processes``: what psutil sees of all this;
- ``run``: all of it, once.
"""
