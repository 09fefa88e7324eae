"""Run one program that nobody trusts: ``python -s -P -S isolate.py JOB``.

The process leaves every namespace that it shares with the machine (mounts, network, processes, IPC,
host name), sees a file system of its own, limits its resources, gives up its rights and system
calls, and only then starts the program. A launcher outside waits; the first process inside ends
with the program, and the kernel ends whatever the program left running with it.
"""

import ctypes
import json
import os
import platform
import resource
import runpy
import signal
import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

LIBC = ctypes.CDLL(None, use_errno=True)
NEW_NS, NEW_UTS, NEW_IPC, NEW_USER, NEW_PID, NEW_NET = (
    *(0x20000, 0x4000000, 0x8000000),
    *(0x10000000, 0x20000000, 0x40000000),
)
NEW_ANY = 0x7E020000 | 0x80
"""Every namespace flag of ``clone``."""
BIND, RECURSIVE, PRIVATE, NO_SUID, NO_DEV = 4096, 16384, 1 << 18, 2, 4
DETACH = 2
SET_PDEATHSIG, SET_SECCOMP, SET_NO_NEW_PRIVS = 1, 22, 38
ATTR_READ_ONLY, ATTR_NO_SUID, ATTR_NO_DEV, AT_RECURSIVE = 1, 2, 4, 0x8000
MOUNT_SETATTR = 442
"""System call of Linux 5.12 on every architecture."""
LIBRARIES = ("/usr/lib", "/usr/lib64", "/lib", "/lib64")
DEVICES = ("null", "zero", "random", "urandom")
FIRST_UID = 0x10000000
"""Where this runs as root, each program gets a user id above this one that nothing else has."""
MIB = 2**20
PROCESSES, FILES, DISK_MIB = 8, 64, 64
MAX_DESCRIPTOR = 1024
"""Above the few descriptors that this process was started with."""

ARCHITECTURES: dict[str, tuple[int, dict[str, int]]] = {
    "x86_64": (
        0xC000003E,
        {
            **{"socket": 41, "ptrace": 101, "unshare": 272, "setns": 308, "mount": 165},
            **{"umount2": 166, "pivot_root": 155, "capset": 126, "clone": 56, "clone3": 435},
            **{"shmget": 29, "semget": 64, "msgget": 68, "mq_open": 240, "memfd_create": 319},
            **{"bpf": 321, "keyctl": 250, "add_key": 248, "request_key": 249},
            **{"io_uring_setup": 425, "perf_event_open": 298, "userfaultfd": 323},
            **{"process_vm_readv": 310, "process_vm_writev": 311, "open_by_handle_at": 304},
        },
    ),
    "aarch64": (
        0xC00000B7,
        {
            **{"socket": 198, "ptrace": 117, "unshare": 97, "setns": 268, "mount": 40},
            **{"umount2": 39, "pivot_root": 41, "capset": 91, "clone": 220, "clone3": 435},
            **{"shmget": 194, "semget": 190, "msgget": 186, "mq_open": 180, "memfd_create": 279},
            **{"bpf": 280, "keyctl": 219, "add_key": 217, "request_key": 218},
            **{"io_uring_setup": 425, "perf_event_open": 241, "userfaultfd": 282},
            **{"process_vm_readv": 270, "process_vm_writev": 271, "open_by_handle_at": 265},
        },
    ),
}
"""Audit number of an architecture, and the numbers of the system calls that are used or denied.

Denied are sockets (vsock, for one, is of no namespace), the memory that no limit counts, tracing,
namespaces, and the parts of the kernel in which its holes have been.
"""


def checked(result: int, doing: str) -> int:
    """Return the result of a call into libc; raise OSError with ``doing`` if it failed."""
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{doing}: {os.strerror(code)}")
    return result


def _call(name: str, *args: object) -> int:
    number = ARCHITECTURES[platform.machine()][1][name]
    return checked(LIBC.syscall(number, *args), name)


def _leave_namespaces() -> None:
    """Leave the namespaces of the machine; the next child is the first process of its own.

    Raises:
        OSError: the kernel or a container refuses it.
    """
    user, group = os.geteuid(), os.getegid()
    flags = NEW_NS | NEW_UTS | NEW_IPC | NEW_PID | NEW_NET
    # Root needs no user namespace, in which it would keep the user id of the machine's root.
    flags |= NEW_USER if user else 0
    checked(LIBC.unshare(flags), "unshare")
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")


def _mount(source: str, target: str, *, kind: str = "", flags: int = 0, options: str = "") -> None:
    texts = [text.encode() or None for text in (source, target, kind)]
    checked(LIBC.mount(*texts, ctypes.c_ulong(flags), options.encode()), f"mount {target}")


def _set_attributes(path: str, attributes: int, *, recursive: bool) -> None:
    wanted = struct.pack("QQQQ", attributes, 0, 0, 0)
    how = AT_RECURSIVE if recursive else 0
    done = LIBC.syscall(MOUNT_SETATTR, -100, path.encode(), how, wanted, len(wanted))
    checked(done, f"mount_setattr {path}")


def _enter_own_files(readable: Sequence[str]) -> None:
    """Replace the file system by the folders of Python, four devices and an empty /tmp.

    Raises:
        OSError: the kernel refuses a mount.
    """
    _mount("none", "/", flags=RECURSIVE | PRIVATE)
    # Opened first: the new root is mounted over /tmp, which may contain some of them.
    wanted = [path for path in (*readable, *LIBRARIES) if os.path.isdir(path)]
    links = {path: os.readlink(path) for path in wanted if os.path.islink(path)}
    opened: dict[str, int] = {}
    for path in sorted(set(wanted) - links.keys(), key=len):
        if not any(path.startswith(f"{outer}/") for outer in opened):
            opened[path] = os.open(path, os.O_PATH)
    devices = {name: os.open(f"/dev/{name}", os.O_PATH) for name in DEVICES}
    root = "/tmp"
    _mount("none", root, kind="tmpfs", flags=NO_SUID | NO_DEV, options="mode=755,size=1m")
    # Before the folders, since an environment may be below /tmp too.
    os.mkdir(f"{root}/tmp")
    options = f"mode=1777,size={DISK_MIB}m,nr_inodes=4096"
    _mount("none", f"{root}/tmp", kind="tmpfs", flags=NO_SUID | NO_DEV, options=options)
    for path, descriptor in opened.items():
        os.makedirs(root + path, exist_ok=True)
        _mount(f"/proc/self/fd/{descriptor}", root + path, flags=BIND | RECURSIVE)
        denied = ATTR_READ_ONLY | ATTR_NO_SUID | ATTR_NO_DEV
        _set_attributes(root + path, denied, recursive=True)
    for path, target in links.items():
        if not os.path.lexists(root + path):
            os.symlink(target, root + path)
    os.mkdir(f"{root}/dev")
    for name, descriptor in devices.items():
        os.close(os.open(f"{root}/dev/{name}", os.O_CREAT | os.O_WRONLY, 0o600))
        _mount(f"/proc/self/fd/{descriptor}", f"{root}/dev/{name}", flags=BIND)
    for descriptor in (*opened.values(), *devices.values()):
        os.close(descriptor)
    os.chdir(root)
    _call("pivot_root", b".", b".")
    checked(LIBC.umount2(b".", DETACH), "umount2")
    os.chdir("/tmp")
    _set_attributes("/", ATTR_READ_ONLY, recursive=False)


def _limit_resources(*, cpu_s: int, memory: int, isolated: bool) -> None:
    """Limit what one process may take, and how many there are in a sandbox."""
    limits = {
        resource.RLIMIT_CPU: cpu_s,
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: 16 * MIB,
        resource.RLIMIT_NOFILE: FILES,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
    }
    # Without isolation it would count all processes of the user.
    if isolated:
        limits[resource.RLIMIT_NPROC] = PROCESSES
    for kind, size in limits.items():
        resource.setrlimit(kind, (size, size))


def _give_up_rights(user: int) -> None:
    """Become a user without rights; root becomes ``user``."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    header, none = struct.pack("Ii", 0x20080522, 0), bytes(24)
    _call("capset", header, none)


def deny_system_calls() -> None:
    """Install a seccomp filter that denies the system calls in ARCHITECTURES."""
    audit, numbers = ARCHITECTURES[platform.machine()]
    load, equal, above, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, refuse, absent = 0x7FFF0000, 0x80000000, 0x50000 | 1, 0x50000 | 38
    # Offsets in seccomp_data: number 0, architecture 4, first argument 16.
    code = [(load, 0, 0, 4), (equal, 1, 0, audit), (give, 0, 0, kill), (load, 0, 0, 0)]
    # Above: the x32 calls of x86, which have numbers of their own.
    code += [(above, 0, 1, 0x40000000), (give, 0, 0, refuse)]
    for name, number in numbers.items():
        if name not in ("clone", "clone3"):
            code += [(equal, 0, 1, number), (give, 0, 0, refuse)]
    # The C library falls back from clone3, whose flags a filter cannot read, to clone.
    code += [(equal, 0, 1, numbers["clone3"]), (give, 0, 0, absent)]
    code += [(equal, 0, 3, numbers["clone"]), (load, 0, 0, 16)]
    code += [(any_bit, 0, 1, NEW_ANY), (give, 0, 0, refuse), (give, 0, 0, allow)]
    packed = b"".join(struct.pack("HBBI", *instruction) for instruction in code)
    body = ctypes.create_string_buffer(packed, len(packed))
    program = struct.pack("HxxxxxxP", len(code), ctypes.addressof(body))
    checked(LIBC.prctl(SET_SECCOMP, 2, program, 0, 0), "seccomp")


def _close_all() -> None:
    """Close every descriptor, so that whoever waits for the end of a pipe sees the program's."""
    os.closerange(0, MAX_DESCRIPTOR)


def _inside(job: dict[str, Any], run: Callable[[dict[str, Any]], None], user: int) -> None:
    """Set up the sandbox in its first process, and run the program."""
    try:
        if job["isolated"]:
            _enter_own_files(job["readable"])
        _limit_resources(cpu_s=job["cpu_s"], memory=job["memory"], isolated=job["isolated"])
        if job["isolated"]:
            _give_up_rights(user)
        # After the change of user, which clears it.
        checked(LIBC.prctl(SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")
        checked(LIBC.prctl(SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
        deny_system_calls()
        # The first process of a namespace ignores signals, so the program is another one, unless
        # the runner starts several itself.
        child = os.fork() if job["mode"] != "program" else 0
    except (OSError, ValueError) as error:
        os.write(job["status"], f"{error}\n".encode())
        return
    if child:
        _close_all()
        os.waitpid(child, 0)
    else:
        os.write(job["status"], b"ready\n")
        os.close(job["status"])
        run(job)


def main() -> None:
    """Run the job that the descriptor of the first argument contains."""
    with os.fdopen(int(sys.argv[1]), "rb") as stream:
        job = json.load(stream)
    # Read before the file system is left behind.
    run = runpy.run_path(job["runner"])["MODES"][job["mode"]]
    sys.path += job["packages"]
    user = FIRST_UID + os.getpid()
    try:
        if platform.machine() not in ARCHITECTURES:
            raise OSError(f"the system calls of {platform.machine()} are not known")
        if job["isolated"]:
            _leave_namespaces()
        checked(LIBC.prctl(SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")
        first = os.fork()
    except OSError as error:
        os.write(job["status"], f"{error}\n".encode())
        return
    if first:
        _close_all()
        os.waitpid(first, 0)
    else:
        try:
            _inside(job, run, user)
        finally:
            os._exit(0)


if __name__ == "__main__":
    main()
