"""A process stepped from one system call to the next, with a fault at any of them.

`trace` forks this process, which has everything imported, runs one function in the child under ptrace, and
returns what the child did: its system calls, what it acknowledged, how it ended. A `Fault` kills it at a call,
makes a call fail without running it, or makes a write short. That is nearer to a real fault than any patched
function: whatever library issues the call meets it, and no `finally` runs after a kill.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
import platform
import signal
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

# Canonical name, shape of the arguments, number on x86_64 and on aarch64. Shape: p path, d folder descriptor
# of the path that follows, f descriptor of a file or folder, o flags, . anything else.
_TABLE = """
read f 0 63|pread f 17 67|pread f 295 69|pread f 327 286|readv f 19 65|lseek f 8 62|mmap ....f 9 222
getdents f 217 61|readlink p 89 -|readlink dp 267 78|open po 2 -|open dpo 257 56|openat2 dp 437 437|creat p 85 -
close f 3 57|flock f 73 32|fcntl f 72 25|write f 1 64|pwrite f 18 68|writev f 20 66|pwritev f 296 70
pwritev2 f 328 287|sendfile ff 40 71|copy_file_range f.f 326 285|fallocate f 285 47|truncate p 76 45
ftruncate f 77 46|ioctl f 16 29|fsync f 74 82|fdatasync f 75 83|sync_file_range f 277 84|syncfs f 306 267
rename pp 82 -|rename dpdp 264 38|rename dpdp 316 276|link pp 86 -|link dpdp 265 37|symlink .p 88 -
symlink .dp 266 36|unlink p 87 -|unlink dpo 263 35|mkdir p 83 -|mkdir dp 258 34|rmdir p 84 -|stat p 4 -
stat p 6 -|stat f 5 80|stat dp 262 79|stat dp 332 291|access p 21 -|access dp 269 48|access dp 439 439
statfs p 137 43|statfs f 138 44|chmod p 90 -|chmod f 91 52|chmod dp 268 53|utime dp 280 88
"""
_ARM = platform.machine() == "aarch64"
_ROWS = [row.split() for row in _TABLE.strip().replace("\n", "|").split("|")]
_KNOWN = {int(row[2 + _ARM]): (row[0], row[1]) for row in _ROWS if row[2 + _ARM] != "-"}

_TRACEME, _SYSCALL, _SETOPTIONS, _GETREGSET, _SETREGSET, _SYSCALL_INFO = 0, 24, 0x4200, 0x4204, 0x4205, 0x420E
_OPTIONS = 0x100000 | 0x8 | 0x1  # EXITKILL: the child never outlives us; TRACECLONE: its threads; TRACESYSGOOD
_ANY_THREAD = 0x40000000  # __WALL
_CWD = -100
# Places in the general registers: result of a call, number of a call, third argument. On aarch64 the number
# has a register set of its own.
_RESULT, _NUMBER, _COUNT, _REGISTERS = (0, None, 2, 34) if _ARM else (10, 15, 12, 27)


@dataclass
class Call:
    """One system call; `result` is None where the process was killed before it ran, -errno where it failed."""

    name: str
    args: tuple[int, ...]
    paths: tuple[str, ...] = ()
    flags: int = 0
    result: int | None = None
    data: bytes = b""  # what a write wrote
    offset: int = 0  # where

    @property
    def writes(self) -> bool:
        return self.name in ("write", "pwrite", "writev", "pwritev", "pwritev2", "sendfile", "copy_file_range")

    @property
    def takes_space(self) -> bool:
        """A full disk may refuse it."""
        creates = self.name in ("creat", "mkdir", "link", "symlink", "rename", "fsync", "fdatasync", "fallocate")
        return creates or self.writes or (self.name == "open" and bool(self.flags & os.O_CREAT))

    @property
    def changes(self) -> bool:
        """It leaves something behind: a file, a lock, an acknowledgement."""
        return self.takes_space or self.name in ("unlink", "rmdir", "flock", "truncate", "ftruncate", "acknowledge")

    def __str__(self) -> str:
        return f"{self.name}({', '.join(map(os.path.basename, self.paths))})"


@dataclass(frozen=True)
class Fault:
    """What happens at call number `at` (from 0), and at the later calls for which `lasting` is true."""

    at: int
    action: str  # "kill before", "kill after", "fail", "short"
    errno: int = 0
    lasting: Callable[[Call], bool] | None = None

    def hits(self, number: int, call: Call) -> bool:
        return number == self.at or (number > self.at and self.lasting is not None and self.lasting(call))


@dataclass
class Outcome:
    """How the child ended; `status` is its exit status, or minus the signal that ended it."""

    pid: int = 0
    status: int = 0
    error: str = ""  # type and message of the exception that ended it
    hit: bool = False  # the fault's call was reached
    acknowledged: list[bytes] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)


def trace(
    function: Callable[[Callable[[bytes], object]], object],
    below: Path | None = None,
    fault: Fault | None = None,
    limit: float = 20.0,
) -> Outcome:
    """Run `function(acknowledge)` in a traced child that is ended by SIGALRM after `limit` seconds.

    Recorded and counted are the calls on paths `below` a folder and the acknowledgements, or all calls.
    """
    pipes = [*os.pipe(), *os.pipe()]
    try:
        os.set_blocking(pipes[0], False)
        os.set_blocking(pipes[2], False)
        pid = os.fork()
        if not pid:
            _child(function, pipes[1], pipes[3], limit)
        with _beside(pid):
            return _Tracer(pid, below, fault, (pipes[0], pipes[1])).run(pipes[2])
    finally:
        for handle in pipes:
            os.close(handle)


@functools.cache
def unavailable() -> str:
    """Why nothing can be traced here; empty if it can."""
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"):
        return f"no tracer for {platform.system()} on {platform.machine()}"
    try:
        outcome = trace(lambda acknowledge: acknowledge(b"here"), limit=5.0)
    except OSError as error:
        return f"ptrace is refused ({error.strerror})"
    reason = outcome.error or f"status {outcome.status}"
    return "" if outcome.acknowledged == [b"here"] else f"ptrace does not work here ({reason})"


def _child(function: Callable[[Callable[[bytes], object]], object], items: int, errors: int, limit: float) -> None:
    """Runs in the child; does not return."""
    status = 1
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, limit)
        _share_cpu(os.getpid())
        gc.disable()  # every run of the child should make the same calls
        os.setpgid(0, 0)  # so that the parent can wait for its threads and for nothing else
        _ptrace(_TRACEME, 0)
        os.kill(os.getpid(), signal.SIGSTOP)
        function(functools.partial(os.write, items))
        status = 0
    except BaseException as error:
        os.write(errors, f"{type(error).__name__}: {error}".encode()[:60000])
    finally:
        os._exit(status)


@contextlib.contextmanager
def _beside(pid: int) -> Iterator[None]:
    """Tracer and child take turns, which costs half the time on one CPU."""
    before = os.sched_getaffinity(0)
    _share_cpu(pid)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _share_cpu(pid: int) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cpus[pid % len(cpus)]})


class _Tracer:
    def __init__(self, pid: int, below: Path | None, fault: Fault | None, items: tuple[int, int]) -> None:
        self._pid, self._fault, self._items = pid, fault, items
        self._below = str(below) if below else ""
        self._outcome = Outcome(pid)
        self._running: dict[int, tuple[Call, bool]] = {}  # by thread: its watched call, whether the fault hits it

    def run(self, errors: int) -> Outcome:
        """Step the child to its end; whatever happens here, it is dead and reaped afterwards."""
        status = os.waitpid(self._pid, 0)[1]
        try:
            if os.WIFSTOPPED(status):
                _ptrace(_SETOPTIONS, self._pid, 0, _OPTIONS)
                with open(f"/proc/{self._pid}/mem", "rb", buffering=0) as memory:
                    self._memory = memory.fileno()
                    _ptrace(_SYSCALL, self._pid)
                    status = self._step_to_the_end()
        except BaseException:
            self._end()
            raise
        self._outcome.status = os.waitstatus_to_exitcode(status)
        with contextlib.suppress(BlockingIOError):
            self._outcome.error = os.read(errors, 1 << 16).decode()
        return self._outcome

    def _end(self) -> None:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(self._pid, signal.SIGKILL)
            while os.waitpid(-self._pid, _ANY_THREAD)[0] != self._pid:
                pass

    def _step_to_the_end(self) -> int:
        while True:
            thread, status = os.waitpid(-self._pid, _ANY_THREAD)
            if not os.WIFSTOPPED(status):
                if thread == self._pid:
                    return status
                continue
            stopped_by = os.WSTOPSIG(status)
            with contextlib.suppress(ProcessLookupError):  # killed since it stopped
                if stopped_by == signal.SIGTRAP | 0x80:
                    self._at_call(thread)
                own = stopped_by in (signal.SIGTRAP, signal.SIGTRAP | 0x80, signal.SIGSTOP)
                _ptrace(_SYSCALL, thread, 0, 0 if own else stopped_by)

    def _at_call(self, thread: int) -> None:
        info = ctypes.create_string_buffer(88)
        _ptrace(_SYSCALL_INFO, thread, len(info), ctypes.addressof(info))
        if info.raw[0] == 1:
            number, *args = struct.unpack_from("=7Q", info, 24)
            self._enter(thread, number, tuple(args))
        elif thread in self._running:
            self._leave(thread, *struct.unpack_from("=q", info, 24))

    def _enter(self, thread: int, number: int, args: tuple[int, ...]) -> None:
        name, shape = _KNOWN.get(number, (f"call {number}", ""))
        call = Call(name, args, self._paths(shape, args), args[shape.index("o")] if "o" in shape else 0)
        if name == "write" and args[0] == self._items[1]:
            call.name, call.paths = "acknowledge", ()
        elif not any(f"{path}/".startswith(f"{self._below}/") for path in call.paths) and self._below:
            return
        hit = self._fault is not None and self._fault.hits(len(self._outcome.calls), call)
        self._outcome.hit |= hit
        self._outcome.calls.append(call)
        self._running[thread] = call, hit
        if hit and self._fault.action == "kill before":
            os.kill(self._pid, signal.SIGKILL)  # in this state the kernel skips the call
        elif hit and self._fault.action == "fail":
            _skip(thread)
        elif hit and self._fault.action == "short":
            _set_register(thread, _COUNT, max(1, args[2] // 2))

    def _leave(self, thread: int, result: int) -> None:
        call, hit = self._running.pop(thread)
        if hit and self._fault.action == "fail":
            result = -self._fault.errno
            _set_register(thread, _RESULT, result)
        elif hit and self._fault.action == "short":
            _set_register(thread, _COUNT, call.args[2])  # a call leaves its arguments as they were
        call.result = result
        if call.name == "acknowledge":
            call.data = os.read(self._items[0], 1 << 16)
            self._outcome.acknowledged.append(call.data)
        elif call.name in ("write", "writev", "pwrite", "pwritev") and result > 0:
            call.data = self._written(call)
            call.offset = call.args[3] if call.name[0] == "p" else self._position(call.args[0]) - result
        if hit and self._fault.action == "kill after":
            os.kill(self._pid, signal.SIGKILL)

    def _written(self, call: Call) -> bytes:
        parts = [(call.args[1], call.result)]
        if call.name.endswith("v"):
            parts = struct.iter_unpack("=2Q", os.pread(self._memory, 16 * call.args[2], call.args[1]))
        return b"".join(os.pread(self._memory, length, address) for address, length in parts)[: call.result]

    def _paths(self, shape: str, args: tuple[int, ...]) -> tuple[str, ...]:
        """The full paths that a call names, by themselves or by descriptors."""
        paths, folder = [], self._descriptor(_CWD) if "p" in shape else ""
        for kind, value in zip(shape, args, strict=False):
            if kind == "d":
                folder = self._descriptor(value)
            elif kind == "p":
                text = os.pread(self._memory, 4096, value).split(b"\0")[0] if value else b""
                paths.append(os.path.normpath(os.path.join(folder, os.fsdecode(text))))
            elif kind == "f":
                paths.append(self._descriptor(value))
        return tuple(paths)

    def _descriptor(self, value: int) -> str:
        number = ctypes.c_int(value).value
        with contextlib.suppress(OSError):
            return os.readlink(f"/proc/{self._pid}/" + ("cwd" if number == _CWD else f"fd/{number}"))
        return ""

    def _position(self, descriptor: int) -> int:
        return int(Path(f"/proc/{self._pid}/fdinfo/{descriptor}").read_text().split()[1])


def _ptrace(request: int, thread: int, address: int = 0, data: int = 0) -> None:
    library = _library()
    if library.ptrace(request, thread, address, data) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)
    library.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    library.ptrace.restype = ctypes.c_long
    return library


def _register_set(request: int, thread: int, registers: ctypes.Array, kind: int = 1) -> None:
    place = (ctypes.c_uint64 * 2)(ctypes.addressof(registers), ctypes.sizeof(registers))  # an iovec
    _ptrace(request, thread, kind, ctypes.addressof(place))


def _set_register(thread: int, place: int, value: int) -> None:
    registers = (ctypes.c_uint64 * _REGISTERS)()
    _register_set(_GETREGSET, thread, registers)
    registers[place] = value & 0xFFFFFFFFFFFFFFFF
    _register_set(_SETREGSET, thread, registers)


def _skip(thread: int) -> None:
    """Let the kernel run no call at all: number -1."""
    if _NUMBER is None:
        _register_set(_SETREGSET, thread, (ctypes.c_int32 * 1)(-1), 0x404)
    else:
        _set_register(thread, _NUMBER, -1)
