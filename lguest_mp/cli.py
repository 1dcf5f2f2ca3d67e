"""``lguest``: the command line of the original launcher.

Options are read as getopt_long(3) reads them: anywhere before ``--``, in any order with everything else, as
``--block=disk`` or ``--block disk``, abbreviated where that is unambiguous. What remains is the guest's memory, its
kernel, and the kernel's arguments. So a kernel argument that begins with a dash has to stand behind ``--``, which
itself goes nowhere: ``lguest 256 vmlinuz root=/dev/vda -- -- -b`` gives the kernel ``root=/dev/vda -- -b``.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from getopt import GetoptError, gnu_getopt
from pathlib import Path

from lguest_mp import __version__, core
from lguest_mp.config import STUCK_AFTER, BlockConfig, CrashPolicy, DeviceConfig, GuestConfig, OnCrash, RngConfig
from lguest_mp.errors import LguestError
from lguest_mp.machine.layout import MAX_CPUS
from lguest_mp.supervisor import ending
from lguest_mp.supervisor.log import Level, say

_USAGE = "usage: lguest [options] <mem-in-mb> <kernel> [kernel arguments...]"
_HELP = f"""{_USAGE}

Boots a Linux kernel in a virtual machine. Every virtqueue is served by a process of its own.

  <mem-in-mb>         the guest's memory, in MiB
  <kernel>            a bzImage, or an ELF vmlinux
  [kernel arguments]  the kernel's command line (those that begin with '-': after '--')

Options, anywhere before '--':
  --block=<file>      a disk; may be given several times
  --rng               a source of random numbers
  --initrd=<file>     the initial RAM disk
  --net=<network>     a network device; may be given several times (below)
  --tunnet=<ip>[:<mac>] or --tunnet=bridge:<name>[:<mac>]
                      the same as --net=tap,ip=<ip> or --net=tap,bridge=<name>
  --username=<user>   become this user before the guest runs (as root)
  --chroot=<dir>      make this the root directory before the guest runs (as root)
  --jail=off          let the guest's processes do whatever you may; to debug lguest
  --kernel-cache=off  unpack the kernel anew, and keep nothing of it in the user's cache directory
  --huge-pages=off    keep the guest's memory in pages of 4 KiB: less of the host's is taken, in more time
  --name=<name>       what to call the guest in 'ps' and 'lguestctl'; otherwise the process ID
  --cpu=<engine>      what executes the guest: kvm, the host's /dev/kvm; unicorn, the embedded CPU; lguest, the host's
                      /dev/lguest; auto, the default: KVM where it can run a stock kernel, the embedded CPU elsewhere
  --cpus=<n>          how many processors the guest has (on KVM)
  --core=<core>       what serves queues and interrupts: compiled, python; auto, the default: compiled, if it was built
  --rings=<format>    the format of the virtqueues: split, the default; or packed, if the guest's driver accepts it
  --machine=<kind>    what the guest finds: pc, or lguest, which is for 32-bit kernels; otherwise what the kernel is for
  --on-crash=[<device>:]<policy>
                      what to do when a worker (of that device: console, block0, net0, ...) crashes: restart it, at most
                      5 times in 30 s (restart,intensity=<n>,period=<seconds>); reset: stop the device; stop the guest
  --stuck-after=<seconds>
                      when a worker that has work and does none of it counts as crashed (30; 0: never)
  --demo              instead of a kernel: run a small guest that comes with lguest (the memory may be left out, too)
  -v, --verbose       tell what happens, and at the end for what the guest left its CPU, and how often
  --help, --version

Networks (each with mac=<mac> and mtu=<bytes>, if you like):
  tap                 an interface of the host (as root); with ip=<address>[/<prefix>] for the host, or bridge=<name> to
                      join; interface=<name>: its name, or one that an administrator made
  user                a network of its own behind the host's, no privileges (slirp4netns);
                      forward=tcp:2222:22 leads from the host's port to the guest's; again for another
  link:<name>         one wire for all of your guests that name it, no privileges

The terminal is the guest's console. Three ^C within a second stop the guest.

Exit status: 0 the guest powered off, 1 lguest could not do it, 2 usage, 3 the guest died, 4 a device's worker died.
"""
_OPTIONS = [
    *("verbose", "net=", "tunnet=", "block=", "rng", "initrd=", "username=", "chroot="),
    *("jail=", "kernel-cache=", "huge-pages=", "name=", "cpu=", "cpus=", "core=", "rings=", "machine=", "on-crash="),
    *("stuck-after=", "demo", "help", "version"),
]
_CPUS = ("auto", "kvm", "unicorn", "lguest")
_RINGS = ("split", "packed")
_MACHINES = ("pc", "lguest")
_SWITCH = ("on", "off")
#: More digits than any number has that is given, as a machine's memory in MiB; how much a guest can have is for its
#: kernel's loader to say.
_DIGITS = 9


class UsageError(Exception):
    """The command line is none; its text says where."""


class Told(Exception):
    """The command line asks for a text, not for a guest."""


def parse(arguments: Sequence[str]) -> GuestConfig:
    """The guest that the arguments (without the program's name) describe.

    UsageError, LguestError (a value that cannot be), Told.
    """
    try:
        options, rest = gnu_getopt(list(arguments), "v", _OPTIONS)
    except GetoptError as error:
        raise UsageError(error.msg) from error
    given = [(name.lstrip("-"), value) for name, value in options]
    single = dict(given)  # of an option that counts once, the last one does
    if "help" in single:
        raise Told(_HELP)
    of_core = _choice("core", single.get("core", core.CHOICES[0]), core.CHOICES)
    if "version" in single:
        raise Told(f"lguest {__version__}\ncore: {core.describe(of_core)}\n")
    cpu = _choice("cpu", single.get("cpu", _CPUS[0]), _CPUS)
    machine = _choice("machine", single["machine"], _MACHINES) if "machine" in single else None
    if "demo" in single:
        rest = _demo(rest)
    if len(rest) < 2:
        raise UsageError("the memory is missing" if not rest else "the kernel is missing")
    return GuestConfig(
        name=_name(single["name"]) if "name" in single else str(os.getpid()),
        memory=_memory(rest[0]),
        kernel=_file("the kernel", rest[1]),
        initrd=_file("--initrd", single["initrd"]) if "initrd" in single else None,
        arguments=tuple(rest[2:]),
        devices=_devices(given),
        username=single.get("username"),
        chroot=_file("--chroot", single["chroot"]) if "chroot" in single else None,
        verbose="verbose" in single or "v" in single,
        cpu=cpu,
        cpus=_count(single["cpus"]) if "cpus" in single else 1,
        machine=machine,
        core=of_core,
        rings=_choice("rings", single.get("rings", _RINGS[0]), _RINGS),
        jail=_choice("jail", single.get("jail", "on"), _SWITCH) == "on",
        kernel_cache=_choice("kernel-cache", single.get("kernel-cache", "on"), _SWITCH) == "on",
        huge_pages=_choice("huge-pages", single.get("huge-pages", "on"), _SWITCH) == "on",
        crash_policies=tuple(_crash_policy(value) for name, value in given if name == "on-crash"),
        stuck_after=_seconds("--stuck-after", single["stuck-after"]) if "stuck-after" in single else STUCK_AFTER,
    )


def _demo(rest: list[str]) -> list[str]:
    """The command line's rest with our own guest for the kernel, and memory for it unless some is given."""
    from lguest_mp import demo  # noqa: PLC0415

    memory = [rest.pop(0)] if rest and rest[0].isdecimal() else [str(demo.MEMORY)]
    return [*memory, str(demo.kernel()), *rest]


def _devices(given: list[tuple[str, str]]) -> tuple[DeviceConfig, ...]:
    devices: list[DeviceConfig] = []
    for name, value in given:
        match name:
            case "block":
                devices.append(BlockConfig(_file("--block", value)))
            case "rng":
                devices.append(RngConfig())
            case "net" | "tunnet":
                devices.append(_network(name, value))
    return tuple(devices)


def _network(option: str, value: str) -> DeviceConfig:
    from lguest_mp.network import options  # noqa: PLC0415 -- most guests have none

    return options.parse_net(value) if option == "net" else options.parse_tunnet(value)


def _crash_policy(text: str) -> tuple[str | None, CrashPolicy]:
    """``[<device>:]<action>[,intensity=<n>][,period=<seconds>]``."""
    device, _, policy = text.rpartition(":")
    action, *settings = policy.split(",")
    known = [each.value for each in OnCrash]
    if action not in known:
        raise LguestError(f"--on-crash={text}: {action!r} is no policy; there is {', '.join(known)}")
    given = dict(setting.partition("=")[::2] for setting in settings)
    if unknown := given.keys() - {"intensity", "period"}:
        raise LguestError(f"--on-crash={text}: {min(unknown)!r} is unknown; there is intensity=<n>, period=<seconds>")
    if given and action != OnCrash.RESTART.value:
        raise LguestError(f"--on-crash={text}: only restart has an intensity and a period")
    intensity, period = given.get("intensity", "5"), _seconds("--on-crash", given.get("period", "30"))
    if not _is_number(intensity) or not period:
        raise LguestError(f"--on-crash={text}: intensity is a number of restarts, period a time in seconds")
    return device or None, CrashPolicy(OnCrash(action), int(intensity), period)


def _seconds(option: str, text: str) -> float:
    whole, point, fraction = text.partition(".")
    if not _is_number(whole) or (point and not _is_number(fraction)):
        raise LguestError(f"{option}: {text!r} is no time; give seconds, for example 30")
    return float(text)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= _DIGITS


def _memory(text: str) -> int:
    if not _is_number(text):
        raise LguestError(f"{text!r} is no memory size; give whole MiB, for example 256")
    return int(text) << 20


def _count(text: str) -> int:
    if not _is_number(text) or not 0 < int(text) <= MAX_CPUS:
        raise LguestError(f"--cpus={text}: a guest has 1 to {MAX_CPUS} processors")
    return int(text)


def _name(text: str) -> str:
    from lguest_mp import registry  # noqa: PLC0415 -- --help needs none of it

    if not registry.is_name(text):
        raise LguestError(
            f"--name={text}: a name has 1 to {registry.NAME_LENGTH} letters, digits, '.', '_' or '-'; not . or .. alone"
        )
    return text


def _file(what: str, text: str) -> Path:
    if not text:
        raise LguestError(f"{what} is an empty name; give a file")
    return Path(text)


def _choice(option: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise UsageError(f"--{option}={value} is unknown; there is {', '.join(known)}")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns its exit status, or dies by the signal that it was told to stop by."""
    try:
        config = parse(sys.argv[1:] if arguments is None else arguments)
        return _launch(config)
    except Told as told:
        sys.stdout.write(str(told))
        return 0
    except UsageError as error:
        say(f"{error}; {_USAGE} (--help tells more)", Level.ERROR)
        return ending.ExitStatus.USAGE
    except LguestError as error:
        say(str(error), Level.ERROR)
        return ending.ExitStatus.FAILED
    except KeyboardInterrupt:
        import signal  # noqa: PLC0415

        ending.die_by(signal.SIGINT)


def _launch(config: GuestConfig) -> int:
    gc.disable()  # until all is there: what is imported and made by then is no garbage, and looking for some takes 5 ms
    from lguest_mp.boot import hashing  # noqa: PLC0415 -- --help needs none of it
    from lguest_mp.supervisor import kvm_probe  # noqa: PLC0415

    _open_standard_files()
    # They are at work while we import what takes longer.
    probe = kvm_probe.start() if config.cpu in {"auto", "kvm"} else None
    payload = hashing.start(config.kernel) if config.kernel_cache else None
    from lguest_mp.supervisor import parts, run  # noqa: PLC0415

    return conclude(run.run(config, parts.of(config, probe, payload)))


def conclude(how: ending.Ending) -> int:  # noqa: RET503 -- two of the three ways never return
    """Acts on the end of the guest: a line and an exit status, death by a signal, or another life."""
    match how:
        case ending.Exit(status, line):
            if line is not None:
                say(line, Level.ERROR)
            return status
        case ending.Signalled(signum):
            ending.die_by(signum)
        case ending.Rebooting():
            from lguest_mp.supervisor import reboot  # noqa: PLC0415

            reboot.execute_again()


def _open_standard_files() -> None:
    """Opens /dev/null for what is not open, so that nothing else gets the number of standard input or output."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
