"""What the machine process needs of the host for a guest on KVM (see ``cpu/needs.py``): the requests of ``api.py``."""

from __future__ import annotations

from lguest_mp.cpu.kvm import api
from lguest_mp.cpu.needs import of_machine
from lguest_mp.jail.calls import ioctls
from lguest_mp.machine.layout import MAX_CPUS

_REQUESTS = (
    *("KVM_CREATE_VM", "KVM_CHECK_EXTENSION", "KVM_GET_VCPU_MMAP_SIZE", "KVM_GET_SUPPORTED_CPUID"),
    *("KVM_CREATE_VCPU", "KVM_SET_USER_MEMORY_REGION", "KVM_SET_TSS_ADDR", "KVM_SET_IDENTITY_MAP_ADDR"),
    *("KVM_SET_GSI_ROUTING", "KVM_IRQFD", "KVM_IOEVENTFD", "KVM_ENABLE_CAP", "KVM_SIGNAL_MSI", "KVM_RUN"),
    *("KVM_GET_REGS", "KVM_SET_REGS", "KVM_GET_SREGS", "KVM_SET_SREGS", "KVM_GET_MSRS", "KVM_SET_MSRS"),
    *("KVM_SET_CPUID2", "KVM_GET_MP_STATE", "KVM_GET_TSC_KHZ", "KVM_GET_API_VERSION"),
)

#: A thread's stack (``machine/kvm_process.py``), and what else it takes; each processor has one.
STACK = 1 << 20
_THREAD = STACK + (256 << 10)
#: A virtual machine and its processors are files of their own; and a processor's is mapped.
_FILES = 1 + 2 * MAX_CPUS
KVM = of_machine(
    ioctls(*((getattr(api, name), name) for name in _REQUESTS)),
    memory=(128 << 20) + MAX_CPUS * _THREAD,
    files=_FILES,
)
