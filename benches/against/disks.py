"""Disks, made once and the same each time."""
import os
import random
import struct

from .common import MIB, run


def raw_disk(bench):
    """Seven parts of ten are data that does not compress, the rest holes, in runs of 1 to 8 MiB."""
    path, dice = bench.folder / "source.raw", random.Random(1)
    if not path.exists():
        with open(path, "wb") as file:
            file.truncate(bench.len)
            at = 0
            while at < bench.len:
                run_len = min(dice.randint(1, 8) * MIB, bench.len - at)
                file.seek(at)
                # Piece by piece: a child's peak memory, as the kernel counts it, begins with its parent's.
                for _ in range(run_len // MIB if dice.random() < 0.7 else 0):
                    file.write(dice.randbytes(MIB))
                at += run_len
    return path


def qcow2_disk(bench):
    path = bench.folder / "source.qcow2"
    if not path.exists():
        run("qemu-img", "convert", "-O", "qcow2", raw_disk(bench), path)
    return path


def chain(bench):
    """Three layers, the upper two with one piece of 256 KiB in every 4 MiB each."""
    below, dice = qcow2_disk(bench), random.Random(2)
    for name in ("snap1.qcow2", "snap2.qcow2"):
        path = bench.folder / name
        if not path.exists():
            run("qemu-img", "create", "-q", "-f", "qcow2", "-b", below, "-F", "qcow2", path)
            places = (at + dice.randrange(60) * 65536 for at in range(0, bench.len - 4 * MIB + 1, 4 * MIB))
            orders = "".join(f"write -q -P {dice.randint(1, 255)} {at} 256k\n" for at in places)
            run("qemu-io", "-f", "qcow2", path, input=orders)
        below = path
    return below


def text_disk(bench):
    """Words with some noise in between: half a mebibyte becomes about two thirds of that."""
    path, dice = bench.folder / "text.raw", random.Random(3)
    if not path.exists():
        words = [bytes(dice.choices(range(97, 123), k=dice.randint(2, 9))) + b" " for _ in range(4000)]
        with open(path, "wb") as file:
            for _ in range(bench.len // MIB):
                text = b"".join(dice.choices(words, k=MIB // 5))
                noisy = (text[at : at + 45] + dice.randbytes(16) for at in range(0, len(text), 45))
                file.write(b"".join(noisy)[:MIB].ljust(MIB))
    return path


def compressed_disk(bench, kind):
    path = bench.folder / f"{kind}.qcow2"
    if not path.exists():
        options = ["-c", "-O", "qcow2", "-o", f"compression_type={kind}"]
        run("qemu-img", "convert", "-f", "raw", *options, text_disk(bench), path)
    return path


def full_disk(bench):
    """A qcow2 with every cluster allocated."""
    path = bench.folder / "full.qcow2"
    if not path.exists():
        run("qemu-img", "create", "-q", "-f", "qcow2", path, bench.len)
        orders = "".join(f"write -q -P {1 + at // MIB % 255} {at} 1M\n" for at in range(0, bench.len, MIB))
        run("qemu-io", "-f", "qcow2", path, input=orders)
    return path


def full_raw(bench):
    """The same as a raw file."""
    path = bench.folder / "full.raw"
    if not path.exists():
        run("qemu-img", "convert", "-O", "raw", "-S", "0", full_disk(bench), path)
    return path


def few_runs(bench):
    """A raw disk four times as long, of which one part in eight is data, in runs of 64 KiB to 1 MiB."""
    path, dice = bench.folder / "few.raw", random.Random(4)
    if not path.exists():
        with open(path, "wb") as file:
            file.truncate(4 * bench.len)
            for at in range(0, 4 * bench.len, 4 * MIB):
                file.seek(at + dice.randrange(48) * CLUSTER)
                file.write(dice.randbytes(dice.randint(1, 15) * CLUSTER))
    return path


def compressed_chain(bench):
    """The compressed disk and, above, two layers with one piece of 256 KiB in every 4 MiB each, compressed too."""
    below, dice = compressed_disk(bench, "zstd"), random.Random(5)
    for name in ("zstd1.qcow2", "zstd2.qcow2"):
        path = bench.folder / name
        if not path.exists():
            options = ["-o", "compression_type=zstd", "-b", below, "-F", "qcow2"]
            run("qemu-img", "create", "-q", "-f", "qcow2", *options, path)
            places = (at + dice.randrange(60) * CLUSTER for at in range(0, bench.len - 4 * MIB + 1, 4 * MIB))
            orders = "".join(f"write -q -c -P {dice.randint(1, 255)} {at} 256k\n" for at in places)
            run("qemu-io", "-f", "qcow2", path, input=orders)
        below = path
    return below


def fragmented_disk(bench):
    """A full qcow2 whose clusters lie in the file in any order."""
    size = bench.len
    order = list(range(size // CLUSTER))
    random.Random(6).shuffle(order)
    return by_hand(bench.folder / "fragmented.qcow2", size, {cluster: place for place, cluster in enumerate(order)})


CLUSTER = 1 << 16


def scattered_disk(bench, size):
    """A qcow2 of `size` bytes with 1 GiB of data, each cluster alone and anywhere."""
    chosen = random.Random(3).sample(range(size // CLUSTER), (1 << 30) // CLUSTER)
    places = {cluster: place for place, cluster in enumerate(sorted(chosen))}
    return by_hand(bench.folder / f"scattered-{size >> 30}.qcow2", size, places)


def by_hand(path, size, places):
    """A qcow2 of `size` bytes with data in the clusters of `places`, each at its place in the file; written by hand, for
    that many orders would take qemu-io an hour. Every L2 table is there, as after years of use."""
    if path.exists():
        return path
    per_table = CLUSTER // 8
    tables = -(-size // CLUSTER // per_table)
    # Header, refcount table, one refcount block, L1 table, L2 tables, payload: 32768 clusters at most.
    l1, l2 = 3, 4
    payload = l2 + tables
    end = payload + len(places)
    copied = 1 << 63
    entries = {}
    for cluster, place in places.items():
        entries.setdefault(cluster // per_table, []).append((cluster % per_table, copied | (payload + place) * CLUSTER))
    head = (3, 0, 0, 16, size, 0, tables, l1 * CLUSTER, CLUSTER, 1, 0, 0, 0, 0, 0, 4, 104)
    dice = random.Random(7)
    with open(path, "wb") as file:
        file.write(b"QFI\xfb" + struct.pack(">IQIIQIIQQIIQQQQII", *head))
        file.seek(CLUSTER)
        file.write(struct.pack(">Q", 2 * CLUSTER))
        file.seek(2 * CLUSTER)
        file.write(struct.pack(">H", 1) * end)
        file.seek(l1 * CLUSTER)
        file.write(struct.pack(f">{tables}Q", *(copied | (l2 + table) * CLUSTER for table in range(tables))))
        file.seek(l2 * CLUSTER)
        for table in range(tables):
            entry_bytes = bytearray(CLUSTER)
            for index, entry in entries.get(table, []):
                struct.pack_into(">Q", entry_bytes, index * 8, entry)
            file.write(entry_bytes)
        for _ in places:
            file.write(dice.randbytes(CLUSTER))
    run("qemu-img", "check", path)
    return path


def allocated_mib(path):
    return os.stat(path).st_blocks * 512 / MIB
