"""One launcher from its resources to its end, with as many guests in a row as reboots in place ask for."""

from __future__ import annotations

import faulthandler
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING

from lguest_mp import registry
from lguest_mp.supervisor import reboot
from lguest_mp.supervisor.children import Naming
from lguest_mp.supervisor.ending import Rebooting
from lguest_mp.supervisor.guest import GRACE, Guest
from lguest_mp.supervisor.log import Level, Log
from lguest_mp.supervisor.notify import Notifier
from lguest_mp.supervisor.resources import open_all
from lguest_mp.supervisor.service import Service
from lguest_mp.supervisor.signals import Signals
from lguest_mp.supervisor.stderr import StandardError
from lguest_mp.terminal import Terminal

if TYPE_CHECKING:
    from lguest_mp.config import GuestConfig
    from lguest_mp.registry import Claim
    from lguest_mp.supervisor.ending import Ending
    from lguest_mp.supervisor.parts import Parts
    from lguest_mp.virtio.device import Device


def run(config: GuestConfig, parts: Parts, grace: float = GRACE) -> Ending:
    """Runs the guest to its end. Rebooting means: by exec, now that everything is closed and put back."""
    faulthandler.enable(2)  # for all that are forked from here, too
    with closing(Log(StandardError(), verbose=config.verbose)) as log, ExitStack() as held:
        log.take_over()
        claim = _claim(config.name, log)
        if claim is not None:
            held.callback(claim.release)
        ending = _live(config, parts, log, grace, claim)
        if isinstance(ending, Rebooting):
            held.pop_all()
            if claim is not None:
                claim.hand_on()
        return ending


def _claim(name: str, log: Log) -> Claim | None:
    """The guest's name, which nobody else's has; None: the host has no place to note that. LguestError: it is taken."""
    try:
        return registry.claim(name)
    except registry.UnavailableError as error:
        log.say(f"{error}; lguestctl will not find this guest", Level.WARNING)
        return None


def _live(config: GuestConfig, parts: Parts, log: Log, grace: float, claim: Claim | None) -> Ending:
    """As many lives in a row as reboots in place ask for."""
    reboots, restarted = reboot.count(), reboot.restarts()
    naming = Naming(config.name)
    with (
        Service(Notifier()) as service,
        closing(open_all(config, parts, log)) as resources,
        Signals() as signals,
        Terminal() as screen,
    ):
        if (lacks := resources.jail.lacks) is not None and not reboots:
            log.say(lacks, Level.WARNING)
        while True:
            _describe(config, parts, resources.devices, reboots, log)
            guest = Guest(resources, naming, signals, screen, service, restarted, grace, reboots=reboots, claim=claim)
            ending = guest.run()
            if not isinstance(ending, Rebooting) or not resources.reboots_in_place:
                if isinstance(ending, Rebooting):
                    reboot.keep(restarted)
                    resources.hand_on()
                return ending
            resources.reset()
            reboots += 1


def _describe(config: GuestConfig, parts: Parts, devices: list[Device], reboots: int, log: Log) -> None:
    log.say(f"guest {config.name}: {config.memory >> 20} MiB of memory, kernel {config.kernel}", Level.INFO)
    log.say(f"executed by {parts.engine}", Level.INFO)
    log.say(f"core: {parts.core}", Level.INFO)
    if reboots:
        log.say(f"reboot {reboots}", Level.INFO)
    if config.initrd is not None:
        log.say(f"initrd {config.initrd}", Level.INFO)
    for index, device in enumerate(devices):
        log.say(f"device {index}: {device.description}", Level.INFO)
