"""Disks of many shapes, copied at rest: against the best peer, and against fio that moves as many bytes."""
import json
import os

from .common import MIB, run, settle, watched
from .disks import allocated_mib, chain, compressed_chain, few_runs, fragmented_disk, raw_disk, scattered_disk

LIMIT = "fio, as many bytes read and written"
TUNED = ["-t", "none", "-T", "none", "-W", "-m", "16"]


class Shape:
    """A source, the format that it is copied to, and how."""

    def __init__(self, title, source, format, shallow=False, warm=False, once=False):
        self.title, self.source, self.format = title, source, format
        self.shallow, self.warm, self.once = shallow, warm, once

    def end(self):
        if self.once:
            self.source.unlink()

    def source_format(self):
        return "raw" if self.source.suffix == ".raw" else "qcow2"

    def data_mib(self):
        """What the source and all below it take on disk; of a shallow copy the top alone."""
        layers, path = 0, self.source
        while path:
            layers += allocated_mib(path)
            path = None if self.shallow else backing_of(path)
        return layers

    def tools(self, bench, target):
        """Each tool's command."""
        formats = ["-f", self.source_format(), "-O", self.format]
        ours = [bench.program, "convert", self.source, target, "--source-format", self.source_format(), "--format", self.format]
        if self.shallow:
            formats += ["-B", str(backing_of(self.source)), "-F", "qcow2"]
            ours.append("--shallow")
        tools = {
            "blkmirror convert": ours,
            "blkmirror convert --cache writeback": ours + ["--cache", "writeback"],
            "blkmirror convert --cache unsafe": ours + ["--cache", "unsafe"],
            "qemu-img convert": ["qemu-img", "convert", *formats, self.source, target],
            "qemu-img convert " + " ".join(TUNED): ["qemu-img", "convert", *TUNED, *formats, self.source, target],
        }
        if self.source_format() == self.format == "raw":
            tools["cp"] = ["cp", "--sparse=auto", "--reflink=never", self.source, target]
            tools["cp, then sync"] = ["sh", "-c", f"cp --reflink=never {self.source} {target} && sync {target}"]
            tools["nbdcopy --flush"] = ["nbdcopy", "--flush", self.source, target]
        return tools


def backing_of(path):
    if path.suffix == ".raw":
        return None
    found = run("qemu-img", "info", path).stdout
    names = [line.split(": ", 1)[1] for line in found.splitlines() if line.startswith("backing file: ")]
    return path.parent / names[0].split(" (")[0] if names else None


def shapes(bench):
    """Made one after the other, as they are asked for."""
    yield Shape("raw to raw", raw_disk(bench), "raw")
    yield Shape("raw to raw, in the page cache", raw_disk(bench), "raw", warm=True)
    yield Shape("few runs of data to qcow2", few_runs(bench), "qcow2")
    yield Shape("chain to qcow2", chain(bench), "qcow2")
    yield Shape("chain to qcow2, the top alone", chain(bench), "qcow2", shallow=True)
    yield Shape("chain to raw, in the page cache", chain(bench), "raw", warm=True)
    yield Shape("zstd chain to raw", compressed_chain(bench), "raw")
    yield Shape("fragmented qcow2 to raw", fragmented_disk(bench), "raw")
    for gib in (256, 1024):
        yield Shape(f"lone clusters in {gib} GiB to qcow2", scattered_disk(bench, gib << 30), "qcow2", once=True)


def copied(bench, shape, target, commands):
    """One copy; without commands, fio's."""
    target.unlink(missing_ok=True)
    if shape.warm:
        read_whole(shape)
    if commands is None:
        return limit(bench, int(shape.data_mib()) or 1)
    return watched(commands) | {"target_mib": allocated_mib(target)}


def read_whole(shape):
    """Brings the source and all below it into the page cache."""
    path = shape.source
    while path:
        with open(path, "rb") as file:
            while file.read(MIB):
                pass
        path = backing_of(path)


def limit(bench, mib):
    """fio reading so many bytes from one file and writing as many to another at once, with O_DIRECT where there is that."""
    source, target = bench.folder / "limit.source", bench.folder / "limit.target"
    if not source.exists() or source.stat().st_size < mib * MIB:
        with open(source, "wb") as file:
            for _ in range(mib):
                file.write(os.urandom(MIB))
        settle()
    direct = "0" if str(bench.folder).startswith("/dev/shm") else "1"
    common = ["--ioengine=io_uring", f"--direct={direct}", "--bs=1m", "--iodepth=8", f"--size={mib}m"]
    target.unlink(missing_ok=True)
    report = bench.folder / "limit.json"
    seen = watched([
        *("fio", f"--output={report}", "--output-format=json", "--end_fsync=1", *common),
        *("--name=read", "--rw=read", f"--filename={source}", "--name=write", "--rw=write", f"--filename={target}"),
    ])
    target.unlink()
    # Not what it takes to start and to report.
    said = report.read_text()
    took = max(job["job_runtime"] for job in json.loads(said[said.index("{") :])["jobs"])
    return seen | {"wall": took / 1000, "target_mib": mib}
