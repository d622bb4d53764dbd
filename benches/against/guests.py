"""A guest that goes on writing while its disk is mirrored."""
import json
import subprocess
import time

from .common import MIB

# Whoever is not ready by then is not going to be.
READY_MAX = 40

# How a guest writes: title, MB/s (0: as fast as it can), fio's words for where.
GUESTS = [
    ("20 MB/s all over the disk", 20, ["--random_distribution=random"]),
    ("20 MB/s, nine of ten writes to a tenth of the disk", 20, ["--random_distribution=zoned:90/10:10/90"]),
    ("100 MB/s all over the disk", 100, ["--random_distribution=random"]),
    ("as fast as it can, all over the disk", 0, ["--random_distribution=random"]),
]


class Guest:
    """fio's 4 KiB random writes through NBD, until the block ends."""

    def __init__(self, server, size, rate, where):
        self.report = server.folder / "fio.json"
        words = ["fio", "--name=guest", *server.engine(), "--output-format=json", f"--output={self.report}"]
        words += ["--rw=randwrite", "--bs=4k", "--iodepth=8", f"--size={size}", "--norandommap", "--randrepeat=1"]
        words += ["--time_based", "--runtime=600", *where]
        self.words = words + ([f"--rate={rate * 1000000}"] if rate else [])

    def __enter__(self):
        self.process = subprocess.Popen(self.words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        # fio forks and connects: what is measured begins when it writes.
        time.sleep(1)
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            # An interrupt has it end and report.
            self.process.send_signal(2)
            self.process.wait()

    def seen(self):
        """After its end: writes a second, and how long they took."""
        said = self.report.read_text()
        job = json.loads(said[said.index("{") :])["jobs"][0]["write"]
        took = job["clat_ns"]
        late = took.get("percentile", {}).get("99.000000", 0)
        return {"guest_mib_per_s": job["bw_bytes"] / MIB, "p99_us": late / 1000, "gap_ms": took["max"] / 1e6}


def followed(server, target, format, size, rate, where):
    """A mirror that is started under such a guest and left when it is ready: how long that took, how often the disk was
    copied, and how the guest fared."""
    with Guest(server, size, rate, where) as guest:
        begun, used = time.monotonic(), server.cpu()
        server.start(target, format, size)
        while not (ready := server.is_ready()) and time.monotonic() - begun < READY_MAX:
            time.sleep(0.05)
        wall, cpu, copied = time.monotonic() - begun, server.cpu() - used, server.copied()
    return {"wall": wall, "ready": ready, "copied": copied / size, "cpu": cpu} | guest.seen()


def pivoted(server, target, format, size, rate, where, seconds):
    """The guest of a disk whose mirror is ready, and that is pivoted after a second; `target` may be none."""
    if target:
        server.start(target, format, size)
        while not server.is_ready():
            time.sleep(0.05)
    with Guest(server, size, rate, where) as guest:
        begun, used = time.monotonic(), server.cpu()
        if target:
            server.end()
        wall, cpu = time.monotonic() - begun, server.cpu() - used
        time.sleep(seconds)
    return {"wall": wall, "cpu": cpu} | guest.seen()


def undisturbed(server, size, rate, where, seconds):
    """The same guest without a mirror."""
    with Guest(server, size, rate, where) as guest:
        time.sleep(seconds)
    return {"wall": 0, "ready": 0, "copied": 0, "cpu": 0} | guest.seen()
