"""The parent of all processes of a guest: it prepares, forks, watches, and clears up. No threads, no guest code.

One chapter each, in the order in which a guest lives through them:

- ``parts``: which machine, kernel loader and devices a guest is made of;
- ``resources``: everything that can fail, opened and checked before anything is forked;
- ``signals``, ``children``, ``loop``: what the host tells us, whom we start, and waiting for either;
- ``guest``: the life of one guest, from forking its machine process to its end;
- ``devices``: the lives of its devices, as its drivers and its workers' ends decide them;
- ``workers``: the processes that serve their queues; ``restarts``: how often they are replaced; ``watch``: finding
  those that are stuck;
- ``ending``: the ways in which it ends, with the line and the exit status of each;
- ``reboot``: starting afresh, by exec or in place;
- ``notify``: words to the service manager that started us; ``service``: which, and when;
- ``processes``: what psutil sees of all this;
- ``log``, ``complaints``, ``stderr``: what is said, by us and by our children, and showing it without ever waiting;
- ``run``: all of it, once.
"""
