"""FUA and FLUSH are answered when the disk below has been flushed behind the writes, whoever made them.

durable.py URI LOG: the log of the server that has the disk, by nbdkit's filter.
"""
import re
import sys
import nbd

uri, log = sys.argv[1:]


def events():
    """What the disk's server began and ended, in its order: names with offsets, and True for an end."""
    begun, found = {}, []
    for line in open(log):
        match = re.search(r"connection=(\d+) (\.\.\.)?(\w+) id=(\d+)(?: offset=(0x[0-9a-f]+))?", line)
        if not match:
            continue
        connection, ended, name, number, offset = match.groups()
        key = (connection, number)
        if ended:
            found.append((*begun.get(key, (name, None)), True))
        else:
            begun[key] = (name, offset and int(offset, 16))
            found.append((*begun[key], False))
    return found


def flushed_behind(offsets):
    found = events()
    ends = [found.index(("Write", offset, True)) for offset in offsets]
    begins = [at for at, event in enumerate(found) if event == ("Flush", None, False) and at > max(ends)]
    return any(("Flush", None, True) in found[at:] for at in begins)


clients = []
for _ in range(4):
    h = nbd.NBD()
    h.connect_uri(uri)
    assert h.can_multi_conn() and h.can_fua()
    clients.append(h)

MIB = 1 << 20
clients[0].pwrite(b"a" * 4096, MIB)
assert not flushed_behind([MIB]), "nobody has asked for it"
clients[0].pwrite(b"b" * 4096, 2 * MIB, flags=nbd.CMD_FLAG_FUA)
assert flushed_behind([2 * MIB]), events()

for number, client in enumerate(clients):
    client.pwrite(b"c" * 4096, (4 + number) * MIB)
assert not flushed_behind([7 * MIB])
clients[0].flush()
assert flushed_behind([4 * MIB, 5 * MIB, 6 * MIB, 7 * MIB]), events()
for client in clients:
    client.shutdown()
