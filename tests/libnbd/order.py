"""Answers come as the disk is done with them, however many were asked for before.

order.py URI GATE: the disk's first 64 KiB are reached once the file GATE is there.
"""
import sys
import nbd

uri, gate = sys.argv[1:]
h = nbd.NBD()
h.connect_uri(uri)

slow = h.aio_pread(nbd.Buffer(4096), 0)
buffers = [nbd.Buffer(512) for _ in range(40)]
fast = {h.aio_pread(buffer, (1 << 20) + 512 * number) for number, buffer in enumerate(buffers)}
fast |= {h.aio_pwrite(bytes([number + 1]) * 512, (2 << 20) + 512 * number) for number in range(20)}
while fast:
    fast = {cookie for cookie in fast if not h.aio_command_completed(cookie)}
    if fast:
        h.poll(-1)
assert not h.aio_command_completed(slow), "nobody has opened the gate"
assert h.aio_in_flight() == 1

open(gate, "w").close()
while not h.aio_command_completed(slow):
    h.poll(-1)
for number in range(20):
    assert h.pread(512, (2 << 20) + 512 * number) == bytes([number + 1]) * 512
h.shutdown()
