"""Unicorn's C interface, as much of it as the engine uses.

The library is loaded without the Python package that carries it: importing that costs a third of a launch's imports,
and its classes wrap every callback. Functions are those of ``unicorn/unicorn.h``.
"""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

from lguest_mp.errors import LguestError

#: The version whose insides `internals.py` knows.
VERSION = (2, 1, 4)

# unicorn.h
UC_ARCH_X86 = 4
UC_MODE_64 = 8
UC_PROT_ALL = 7
UC_ERR_OK = 0
UC_HOOK_INTR = 1
UC_HOOK_INSN_INVALID = 1 << 14
_UC_CTL_UC_USE_EXITS = 4
_UC_CTL_CPU_MODEL = 7
_UC_CTL_TCG_BUFFER_SIZE = 13
# x86.h
UC_CPU_X86_EPYC = 35
UC_X86_REG_CS = 11
UC_X86_REG_DS = 17
UC_X86_REG_ES = 28
UC_X86_REG_FS = 32
UC_X86_REG_GS = 33
UC_X86_REG_RIP = 41
UC_X86_REG_RSI = 43
UC_X86_REG_RSP = 44
UC_X86_REG_SS = 49
UC_X86_REG_CR0 = 50
UC_X86_REG_CR3 = 53
UC_X86_REG_CR4 = 54
UC_X86_REG_GDTR = 243
UC_X86_REG_MSR = 248
UC_X86_REG_RFLAGS = 253

#: uint64_t read(uc, offset, size, user_data); void write(uc, offset, size, value, user_data)
MmioRead = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint, ctypes.c_void_p)
MmioWrite = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint, ctypes.c_uint64, ctypes.c_void_p)


class MsrValue(ctypes.Structure):
    """uc_x86_msr."""

    _fields_ = (("index", ctypes.c_uint32), ("value", ctypes.c_uint64))


class TableRegister(ctypes.Structure):
    """uc_x86_mmr: GDTR and the like."""

    _fields_ = (
        ("selector", ctypes.c_uint16),
        ("base", ctypes.c_uint64),
        ("limit", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
    )


class UnicornLibrary:
    """The loaded library."""

    def __init__(self) -> None:
        self.path = _find()
        try:
            self.dll = ctypes.CDLL(str(self.path))
        except OSError as error:
            raise LguestError(f"cannot load {self.path}: {error}; reinstall the package unicorn") from error
        major, minor = ctypes.c_uint(), ctypes.c_uint()
        self.dll.uc_version.restype = ctypes.c_uint
        packed = self.dll.uc_version(ctypes.byref(major), ctypes.byref(minor))
        version = (packed >> 24, packed >> 16 & 0xFF, packed >> 8 & 0xFF)
        if version != VERSION:
            have, need = (".".join(map(str, numbers)) for numbers in (version, VERSION))
            raise LguestError(f"the embedded CPU needs unicorn {need}, this is {have}; pip install unicorn=={need}")
        pointer, u64, size = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_size_t
        for name, arguments in {
            "uc_open": (ctypes.c_int, ctypes.c_int, pointer),
            "uc_close": (pointer,),
            "uc_emu_start": (pointer, u64, u64, u64, size),
            "uc_emu_stop": (pointer,),
            "uc_mem_map_ptr": (pointer, u64, u64, ctypes.c_uint32, pointer),
            "uc_mmio_map": (pointer, u64, u64, pointer, pointer, pointer, pointer),
            "uc_reg_write": (pointer, ctypes.c_int, pointer),
            "uc_reg_read": (pointer, ctypes.c_int, pointer),
            "uc_hook_add": (pointer, pointer, ctypes.c_int, pointer, pointer, u64, u64),
        }.items():
            function = getattr(self.dll, name)
            function.argtypes = arguments
            function.restype = ctypes.c_int
        self.dll.uc_strerror.argtypes = (ctypes.c_int,)
        self.dll.uc_strerror.restype = ctypes.c_char_p

    def check(self, error: int, what: str) -> None:
        """Raises for what uc_* returned, unless it is UC_ERR_OK."""
        if error != UC_ERR_OK:
            raise LguestError(f"the embedded CPU: {what}: {self.error_text(error)}")

    def error_text(self, error: int) -> str:
        """uc_strerror."""
        text: bytes = self.dll.uc_strerror(error)
        return text.decode()

    def address(self, function: str) -> int:
        """The address of an exported function."""
        try:
            value = ctypes.cast(getattr(self.dll, function), ctypes.c_void_p).value
        except AttributeError:
            value = None
        if value is None:
            raise LguestError(f"{self.path} has no {function}: the embedded CPU needs the wheel of unicorn 2.1.4")
        return value

    def open(self, model: int, translation_bytes: int) -> ctypes.c_void_p:
        """uc_open for a 64-bit x86 CPU of a model, with a buffer of so many bytes for translated code."""
        uc = ctypes.c_void_p()
        self.check(self.dll.uc_open(UC_ARCH_X86, UC_MODE_64, ctypes.byref(uc)), "uc_open")
        self._control(uc, _UC_CTL_CPU_MODEL, model)
        self._control(uc, _UC_CTL_TCG_BUFFER_SIZE, translation_bytes)
        # With exits enabled and none set, no address stops the guest.
        self._control(uc, _UC_CTL_UC_USE_EXITS, 1)
        return uc

    def _control(self, uc: ctypes.c_void_p, control: int, value: int) -> None:
        one_argument, write = 1 << 26, 1 << 30
        error = self.dll.uc_ctl(uc, ctypes.c_int(control | one_argument | write), ctypes.c_int(value))
        self.check(error, f"uc_ctl {control}")


def _find() -> Path:
    package = importlib.util.find_spec("unicorn")
    if package is None or package.origin is None:
        raise LguestError("the embedded CPU needs the package unicorn; pip install unicorn==2.1.4")
    path = Path(package.origin).parent / "lib" / "libunicorn.so.2"
    if not path.exists():
        raise LguestError(f"{path} is missing: the embedded CPU needs the wheel of unicorn 2.1.4 for Linux")
    return path
