"""Servers in processes of their own: blkmirror and its peers."""
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .common import MIB, run

TICK = os.sysconf("SC_CLK_TCK")


class Server:
    """A server in a process of its own, on a Unix socket, until the block ends."""

    def __init__(self, bench, source):
        self.bench, self.source = bench, source
        self.folder = Path(tempfile.mkdtemp(dir=bench.folder))
        self.socket, self.control = self.folder / "nbd", self.folder / "control"

    def __enter__(self):
        words = self.bench.pinned(0) + [str(word) for word in self.command()]
        said = subprocess.DEVNULL if self.quiet else None
        self.process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=said)
        deadline = time.monotonic() + 30
        while not (reachable(self.socket) and (self.quiet or reachable(self.control))):
            if self.process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"benches/peers: {self.command()} does not serve")
            time.sleep(0.02)
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()
        shutil.rmtree(self.folder)

    quiet = False

    def format(self):
        return "raw" if self.source.suffix == ".raw" else "qcow2"

    def engine(self):
        return ["--ioengine=nbd", f"--uri=nbd+unix:///vda?socket={self.socket}"]

    def cpu(self):
        """CPU seconds so far, all threads."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / TICK

    def peak_mib(self):
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024


def reachable(path):
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


class Ours(Server):
    def command(self):
        sockets = ["--socket", self.socket, "--control", self.control, "--state", self.folder / "state"]
        return [self.bench.program, "serve", "--export", f"vda={self.source},format={self.format()}", *sockets]

    def mirror(self, target, format, _size):
        run(self.bench.program, "mirror", "--control", self.control, "vda", target, "--format", format, "--wait", "--pivot")

    def start(self, target, format, _size):
        run(self.bench.program, "mirror", "--control", self.control, "vda", target, "--format", format, *self.words)

    def status(self):
        return json.loads(run(self.bench.program, "status", "--control", self.control, "vda", "--json").stdout)

    def is_ready(self):
        return self.status()["phase"] == "ready"

    def copied(self):
        return self.status()["copied_bytes"]

    words = []


    def end(self):
        run(self.bench.program, "pivot", "--control", self.control, "vda")


class OursInBackground(Ours):
    words = ["--mode", "background"]


class OursUnbound(Ours):
    """Copies as fast as it can, whatever the guest's requests take."""

    words = ["--latency-factor", "0"]


class StorageDaemon(Server):
    def node(self, name, path, format):
        file = {"driver": "file", "filename": str(path), "aio": self.aio, "cache": {"direct": True}, "discard": "unmap"}
        return {"driver": format, "node-name": name, "file": file, "cache": {"direct": True}, "discard": "unmap"}

    def command(self):
        return [
            "qemu-storage-daemon",
            *("--chardev", f"socket,id=control,path={self.control},server=on,wait=off", "--monitor", "chardev=control"),
            *("--nbd-server", f"addr.type=unix,addr.path={self.socket}"),
            *("--blockdev", json.dumps(self.node("disk", self.source, self.format()))),
            *("--export", "nbd,id=vda,node-name=disk,name=vda,writable=on"),
        ]

    def mirror(self, target, format, size):
        self.start(target, format, size)
        expect(self.lines, "BLOCK_JOB_READY")
        self.end()

    def start(self, target, format, size):
        run("qemu-img", "create", "-q", "-f", format, target, size)
        # Kept: whoever hangs up does not hear of the end.
        self.connection = socket.socket(socket.AF_UNIX)
        self.connection.connect(str(self.control))
        self.lines = self.connection.makefile("rw")
        self.lines.readline()
        ask(self.lines, "qmp_capabilities")
        ask(self.lines, "blockdev-add", **self.node("target", target, format))
        job = {"job-id": "job", "device": "disk", "target": "target", "sync": "full", "copy-mode": self.copy_mode}
        ask(self.lines, "blockdev-mirror", **job)

    def end(self):
        """Waits for 40 s at most: under a guest that writes much a mirror may not come to its end."""
        ask(self.lines, "block-job-complete", device="job")
        self.connection.settimeout(40)
        try:
            expect(self.lines, "BLOCK_JOB_COMPLETED")
        except TimeoutError:
            pass

    def is_ready(self):
        return ask(self.lines, "query-block-jobs")[0]["ready"]

    def copied(self):
        return ask(self.lines, "query-block-jobs")[0]["offset"]

    copy_mode = "background"


class Native(StorageDaemon):
    aio = "native"


class NativeBlocking(Native):
    copy_mode = "write-blocking"


class Uring(StorageDaemon):
    aio = "io_uring"


events = []


def ask(lines, order, **arguments):
    lines.write(json.dumps({"execute": order, "arguments": arguments}) + "\n")
    lines.flush()
    while "return" not in (answer := json.loads(lines.readline())):
        if "error" in answer:
            sys.exit(f"benches/peers: {order}: {answer['error']['desc']}")
        events.append(answer["event"])
    return answer["return"]


def expect(lines, event):
    while event not in events:
        message = json.loads(lines.readline())
        events.append(message["event"])
    events.remove(event)


# Without control


class Nbd(Server):
    quiet = True

    def command(self):
        options = ["--persistent", "--shared=8", "--cache=none", f"--aio={self.aio}", f"--format={self.format()}"]
        return ["qemu-nbd", *options, "--export-name=vda", f"--socket={self.socket}", self.source]


class NbdNative(Nbd):
    aio = "native"


class NbdUring(Nbd):
    aio = "io_uring"


class Nbdkit(Server):
    """The page cache is its only way, dropped behind each request."""

    quiet = True

    def command(self):
        return ["nbdkit", "--foreground", f"--unix={self.socket}", "file", self.source, "cache=none"]


class NbdkitMemory(Server):
    """A disk of zeroes in memory, which costs as little as a server can."""

    quiet = True

    def command(self):
        return ["nbdkit", "--foreground", f"--unix={self.socket}", "memory", str(self.source)]

    def uri(self):
        return f"nbd+unix:///?socket={self.socket}"


class Bare(Server):
    """Nobody: fio on the file itself, the most that a server could do."""

    def __init__(self, bench, source):
        self.bench, self.source = bench, source

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def engine(self):
        return ["--ioengine=io_uring", "--direct=1", f"--filename={self.source}"]

    def cpu(self):
        return 0

    def peak_mib(self):
        return 0
