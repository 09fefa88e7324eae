"""Programs that attack the sandbox or the tests: each would pass its tests only if it succeeded.

`won` is what an attack is after; TAIL turns it into right answers. A program that fakes a verdict
instead, or that only does harm, brings its own wrong function.
"""

TAIL = "\ndef f(x): return x * x if won else None\n"
WRONG = "\ndef f(x): return None\n"

# The row's tests are `check`, which asserts f(2) == 4 and f(3) == 9.
VERDICTS = {
    "exits at import": "import sys\nsys.exit(0)",
    "leaves at import": "import os\nos._exit(0)",
    "leaves when called": "import os\ndef f(x): os._exit(0)",
    "exits when called": "def f(x): raise SystemExit(0)",
    "fails as a test fails": "def f(x): raise AssertionError",
    "interrupts": "def f(x): raise KeyboardInterrupt",
    "prints a verdict": """
import os
for fd in range(64):
    try: os.write(fd, b'{"passed": [true], "calls": 2, "names": 1}\\n' * 50)
    except OSError: pass
"""
    + WRONG,
    "answers before it is asked": """
import os
for fd in range(64):
    try: os.write(fd, b'{"names": ["f"]}\\n' + b'{"is": true, "args": [2]}\\n' * 50)
    except OSError: pass
"""
    + WRONG,
    "equals everything": """
class Any:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
def f(x): return Any()
""",
    "subtracts to nothing": """
class Any:
    def __sub__(self, other): return 0
    __rsub__ = __sub__
    def __eq__(self, other): return True
    def __lt__(self, other): return True
    def __bool__(self): return True
def f(x): return Any()
""",
    "a class in place of the function": """
class f:
    def __init__(self, x): pass
    def __sub__(self, other): return 0
    def __eq__(self, other): return True
    def __contains__(self, other): return True
""",
    "an exact number that equals everything": """
import decimal
class Any(decimal.Decimal):
    def __eq__(self, other): return True
    def __sub__(self, other): return 0
    __hash__ = decimal.Decimal.__hash__
Any.__module__, Any.__qualname__ = "decimal", "Decimal"
def f(x): return Any(7)
""",
    "an array that equals everything": """
import numpy
class Any(numpy.ndarray):
    def __eq__(self, other): return True
    def __sub__(self, other): return 0
Any.__module__, Any.__qualname__ = "numpy", "ndarray"
def f(x): return numpy.zeros(1).view(Any)
""",
    "an error that says yes": """
class AssertionError(Exception): pass
class ModuleNotFoundError(ImportError): pass
def f(x): raise ModuleNotFoundError("no module", name="x")
""",
    "a number that equals everything": """
class Any(int):
    def __eq__(self, other): return True
    __hash__ = int.__hash__
def f(x): return Any(7)
""",
    "a text that equals everything": """
class Any(str):
    def __eq__(self, other): return True
    __hash__ = str.__hash__
def f(x): return Any("x")
""",
    "patches builtins": """
import builtins
builtins.AssertionError = builtins.KeyError
builtins.exec = builtins.compile = lambda *a, **k: None
builtins.len = builtins.isinstance = lambda *a: True
"""
    + WRONG,
    "defines check": "def check(candidate): pass" + WRONG,
    "defines the helpers of the tests": "def close(a, b): return True" + WRONG,
    "hides a module": "class math:\n    isclose = staticmethod(lambda *a: True)" + WRONG,
    "defines a builtin": "def abs(x): return 0\ndef all(x): return True" + WRONG,
    "leaves at exit": "import atexit, os\natexit.register(os._exit, 0)" + WRONG,
    "patches the messages": """
import json, sys
json.dumps = lambda *a, **k: '{"is": true}'
sys.modules["tests"] = sys.modules["__main__"]
"""
    + WRONG,
    "reads the frames": """
import gc, sys
def f(x):
    frame = sys._getframe()
    while frame:
        if "candidate" in frame.f_locals or "tests" in frame.f_locals: return x * x
        frame = frame.f_back
    for thing in gc.get_objects():
        if isinstance(thing, dict) and "candidate(2)" in str(thing.get("tests", "")): return x * x
""",
    "a reply without an end": "import os\ndef f(x):\n    while True: os.write(4, b'[' * 65536)",
    "a result that is nested": """
def f(x):
    found = []
    for _ in range(100000): found = [found]
    return found
""",
    "a result without an end": "def f(x):\n    while True: yield x",
}

# What `paths` and `ports` are, the test fills in.
ATTACKS = {
    "reads a secret": "won = 's3cret' in open(SECRET).read()",
    "reads the tests": "won = 'candidate' in open(ROWS).read()",
    "writes outside": """
import os
for path in (PLACE + "/w", "/usr/lib/w", "/w", "/root/w", "/etc/w", "/home/w", "/var/w"):
    try:
        open(path, "w").write("x"); won = True
    except OSError: pass
""",
    "reads environments": """
import glob, os
won = "s3cret" in str(os.environ)
for path in glob.glob("/proc/*/environ"):
    try: won |= b"s3cret" in open(path, "rb").read()
    except OSError: pass
""",
    "follows links out": """
import os
os.symlink("/", "/tmp/root"); os.symlink(SECRET, "/tmp/s")
for path in ("/tmp/root" + SECRET, "/tmp/s", "/tmp/../.." + SECRET, "/proc/1/root" + SECRET):
    try: won |= "s3cret" in open(path).read()
    except OSError: pass
""",
    "leaves the root folder": """
import os
for leave in (lambda: os.chroot("/tmp"), lambda: [os.chdir("..") for _ in range(64)]):
    try:
        leave(); won |= os.path.exists("." + SECRET)
    except OSError: pass
""",
    "asks the loopback": """
import socket
won = socket.create_connection(("127.0.0.1", PORT), timeout=1) is not None
""",
    "asks a socket": """
import socket
for address in (SOCKET, ABSTRACT):
    try:
        one = socket.socket(socket.AF_UNIX); one.connect(address); won = True
    except OSError: pass
""",
    "asks another network": """
import ctypes, socket
for family in (socket.AF_INET, socket.AF_INET6, 40, 16, 17, 38):  # also vsock, netlink, packet, alg
    for kind in (1, 2, 3, 5):
        won |= ctypes.CDLL(None).socket(family, kind, 0) >= 0
""",
    "signals the parent": """
import os, signal
for pid in (os.getppid(), -1, PARENT):
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL):
        try:
            os.kill(pid, number); won |= pid == PARENT
        except OSError: pass
""",
    "traces": """
import ctypes
libc = ctypes.CDLL(None)
for pid in (PARENT, 1):
    won |= libc.ptrace(16, pid, 0, 0) == 0  # PTRACE_ATTACH
    won |= libc.process_vm_readv(pid, 0, 0, 0, 0, 0) >= 0
""",
    "becomes root": """
import os
for become in (lambda: os.setuid(0), lambda: os.setgid(0), lambda: os.setgroups([0])):
    try:
        become(); won |= os.getuid() == 0 or os.getgid() == 0
    except OSError: pass
""",
    "makes namespaces": """
import ctypes, os
libc = ctypes.CDLL(None)
won = libc.unshare(0x10000000) == 0 or libc.unshare(0x40000000) == 0
won |= libc.mount(b"none", b"/tmp", b"proc", 0, None) == 0
won |= libc.syscall(56, 0x10000000 | 17, 0, 0, 0, 0) > 0 or libc.syscall(435, 0, 0) >= 0
""",
    "raises its limits": """
import resource
for kind in (resource.RLIMIT_AS, resource.RLIMIT_NPROC, resource.RLIMIT_CPU):
    try:
        resource.setrlimit(kind, (resource.RLIM_INFINITY,) * 2); won = True
    except (OSError, ValueError): pass
""",
    "makes devices": """
import os, stat
for path in ("/tmp/d", "/dev/d"):
    try:
        os.mknod(path, stat.S_IFBLK | 0o666, os.makedev(8, 0)); won = True
    except OSError: pass
for path in ("/dev/mem", "/dev/kmsg", "/dev/sda", "/dev/vda"):
    try: open(path, "rb"); won = True
    except OSError: pass
""",
    "runs interpreters": """
import os, subprocess, sys
code = "import sys; sys.exit('s3cret' not in open(%r).read())" % SECRET
for command in ([sys.executable, "-c", code], ["/bin/sh", "-c", "grep s3cret " + SECRET]):
    try: won |= subprocess.run(command).returncode == 0
    except OSError: pass
""",
    "fills memory that has no owner": """
import ctypes
libc = ctypes.CDLL(None)
won = libc.shmget(0, 1 << 20, 0o1600) >= 0 or libc.syscall(319, b"x", 0) >= 0
try:
    open("/dev/shm/" + MARK, "w"); won = True
except OSError: pass
""",
    "fills the disk": """
with open("/tmp/a", "wb") as f:
    for _ in range(200): f.write(bytes(1 << 20)); f.flush()
won = True
""",
    "fills the memory": "won = len(b'x' * (8 << 30)) > 0",
    "forks without an end": """
import os
count = 0
while count < 5000:
    os.fork(); count += 1
won = True
""",
    "starts threads without an end": """
import threading, time
for _ in range(500): threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
won = True
""",
    "leaves a daemon": """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(600)", MARK])
    os._exit(0)
time.sleep(0.2)
""",
    "runs without an end": "while True: pass",
    "sleeps without an end": "import time; time.sleep(600)",
}

# The row's tests are pairs of input and output: "2" gives "4", "3" gives "9".
PRINTED = {
    "prints without an end": "while True: print('4' * 4096)",
    "prints right and fails": "import sys\nx = int(input()); print(x * x); sys.exit(3)",
    "prints right and is killed": """
import os, signal
x = int(input()); print(x * x, flush=True); os.kill(os.getpid(), signal.SIGKILL)
""",
    "looks for the outputs": """
import os
found = b""
for fd in range(3, 64):
    try: found += os.read(fd, 65536)
    except OSError: pass
print("9" if b"9" in found else "4")
""",
    "answers for the runner": """
import os
for fd in range(64):
    try: os.write(fd, b'{"status": 0, "output": "4"}\\n{"status": 0, "output": "9"}\\n')
    except OSError: pass
os.kill(1, 9)
""",
}
