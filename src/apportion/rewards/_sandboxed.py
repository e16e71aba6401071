"""A program that runs another one's source and its tests, locked in first: no files, network, processes or signals.

It is run by `sandbox.py`, in an interpreter of its own, with the standard library only; its input is JSON on stdin. The
lock needs no privileges: Landlock (Linux 5.13) leaves nothing of the file system but read access to Python's libraries,
a seccomp filter refuses the system calls by which a process reaches others, the network or the rights of files, all
capabilities are dropped, and resource limits bound memory, processor time and open files.

It writes lines "TOKEN ready", then "TOKEN i" after test i has passed; the token comes with the input.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys
import sysconfig

LIBC = ctypes.CDLL(None, use_errno=True)
NO_NEW_PRIVILEGES, SECCOMP, FILTER = 38, 22, 2  # of prctl
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT, BENEATH = 444, 445, 446, 1
READ_FILE, READ_FOLDER = 1 << 2, 1 << 3
RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}  # of files, by Landlock's version
LIBRARIES = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/share/zoneinfo", "/etc/localtime", "/dev/urandom")

# system calls by number on (x86_64, aarch64), None where there is none
DENIED = {
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200), "sendmsg": (46, 211),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kill": (62, 129),
    "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "kcmp": (312, 272),
    "execve": (59, 221), "execveat": (322, 281), "fork": (57, None), "vfork": (58, None), "unshare": (272, 97),
    "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsmount": (432, 432),
    "mount_setattr": (442, 442), "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "chmod": (90, None), "fchmod": (91, 52),
    "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None), "fchown": (93, 55), "lchown": (94, None),
    "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None), "futimesat": (261, None),
    "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16), "setrlimit": (160, 164),
    "prlimit64": (302, 261), "sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118), "sched_setattr": (314, 274), "setpriority": (141, 140), "ioprio_set": (251, 30),
    "migrate_pages": (256, 238), "move_pages": (279, 239), "shmget": (29, 194), "shmat": (30, 196),
    "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180), "memfd_create": (319, 279),
}  # fmt: skip
MACHINES = {"x86_64": (0, 0xC000003E, 56, 435), "aarch64": (1, 0xC00000B7, 220, 435)}  # column, arch, clone, clone3
LOAD, EQUAL, ANY_BIT, AT_LEAST, RETURN = 0x20, 0x15, 0x45, 0x35, 0x06  # instructions of a filter
ALLOW, KILL, ERROR, EPERM, ENOSYS, THREAD = 0x7FFF0000, 0x80000000, 0x00050000, 1, 38, 0x00010000


class Locked(Exception):
    """The lock cannot be had on this machine; the text is the reason."""


def call(name: str, number: int, *args: object) -> int:
    """Return the result of a system call. Raises Locked where it fails."""
    LIBC.syscall.restype = ctypes.c_long
    result = int(LIBC.syscall(ctypes.c_long(number), *args))
    if result < 0:
        raise Locked(f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


def prctl(name: str, *args: int) -> None:
    """Call prctl. Raises Locked where it fails."""
    if LIBC.prctl(*map(ctypes.c_ulong, args)) != 0:
        raise Locked(f"{name}: {os.strerror(ctypes.get_errno())}")


def limit_resources(memory: int, seconds: int) -> None:
    """Bound this process's address space (bytes), processor time, and open files."""
    for kind, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_FSIZE, 1 << 20),  # of the answers, the only file that is open
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (value, value))


def drop_capabilities() -> None:
    """Give up what root may do; an ordinary user has nothing to give up."""
    header, nothing = struct.pack("Ii", 0x20080522, 0), bytes(24)
    call("capset", {"x86_64": 126, "aarch64": 91}[platform.machine()], header, nothing)


def lock_files() -> None:
    """Leave nothing of the file system but read access to Python's libraries."""
    version = call("Landlock", LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    rights = RIGHTS[max(known for known in RIGHTS if known <= version)]
    handled = struct.pack("Q", rights)
    rules = call("Landlock", LANDLOCK_CREATE, handled, ctypes.c_size_t(len(handled)), ctypes.c_uint32(0))
    own = [
        path for name, path in sysconfig.get_paths().items() if name in ("stdlib", "platstdlib", "purelib", "platlib")
    ]
    for path in {*LIBRARIES, *own, os.path.dirname(os.path.realpath(sys.executable)) + "/../lib"}:
        if os.path.exists(path):
            opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
            allowed = READ_FILE | (READ_FOLDER if os.path.isdir(path) else 0)
            rule = struct.pack("=Qi", allowed, opened)
            call("Landlock", LANDLOCK_ADD, ctypes.c_int(rules), ctypes.c_int(BENEATH), rule, ctypes.c_uint32(0))
            os.close(opened)
    call("Landlock", LANDLOCK_RESTRICT, ctypes.c_int(rules), ctypes.c_uint32(0))
    os.close(rules)


def lock_calls() -> None:
    """Refuse the system calls in `DENIED`, new processes, and every call of another architecture."""
    column, arch, clone, clone3 = MACHINES[platform.machine()]

    def op(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("HBBI", code, yes, no, value)

    program = [op(LOAD, 4), op(EQUAL, arch, 1, 0), op(RETURN, KILL), op(LOAD, 0)]
    program += [op(AT_LEAST, 0x40000000, 0, 1), op(RETURN, ERROR | EPERM)]  # x32
    for numbers in DENIED.values():
        number = numbers[column]
        if number is not None:
            program += [op(EQUAL, number, 0, 1), op(RETURN, ERROR | EPERM)]
    program += [op(EQUAL, clone3, 0, 1), op(RETURN, ERROR | ENOSYS)]  # its flags are in memory: libc then uses clone
    program += [op(EQUAL, clone, 0, 3), op(LOAD, 16), op(ANY_BIT, THREAD, 1, 0), op(RETURN, ERROR | EPERM)]
    program += [op(RETURN, ALLOW)]
    code = ctypes.create_string_buffer(b"".join(program))
    fprog = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    pointer = ctypes.create_string_buffer(fprog)
    prctl("seccomp", SECCOMP, FILTER, ctypes.addressof(pointer), 0, 0)


def lock(memory: int, seconds: int) -> None:
    """Lock this process in. Raises Locked where the machine cannot."""
    if platform.system() != "Linux" or platform.machine() not in MACHINES:
        raise Locked(f"{platform.system()} on {platform.machine()}, where the built-in sandbox does not exist")
    limit_resources(memory, seconds)
    prctl("no_new_privs", NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    drop_capabilities()
    lock_files()
    lock_calls()


def main() -> None:
    """Read the request, lock, run the program, then its tests one after another."""
    request = json.loads(sys.stdin.buffer.read())
    report = os.fdopen(os.dup(1), "w", buffering=1)
    silent = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(silent, stream)
    token = request["token"]
    try:
        if request["lock"]:
            lock(request["memory"], int(request["seconds"]) + 1)
    except (Locked, OSError, ValueError, KeyError) as error:
        report.write(f"{token} refused {error}\n")
        return
    report.write(f"{token} ready\n")
    signal.setitimer(signal.ITIMER_REAL, request["seconds"])  # it ends the process
    names = {"__name__": "solution"}
    try:
        exec(compile(request["program"], "<program>", "exec"), names)
    except BaseException:
        return
    for place, test in enumerate(request["tests"]):
        try:
            exec(compile(test, f"<test {place}>", "exec"), names)
        except BaseException:
            continue
        report.write(f"{token} {place}\n")


main()
