"""A client that disconnects gets the answers to what it had asked for before, then the end.

disconnect.py URI GATE: the disk's first 64 KiB are reached once the file GATE is there.
"""
import sys
import nbd

uri, gate = sys.argv[1:]
h = nbd.NBD()
h.connect_uri(uri)
data = nbd.Buffer.from_bytearray(bytearray(b"w" * 4096))
held = [h.aio_pwrite(data, 4096 * number) for number in range(8)]
held += [h.aio_pread(nbd.Buffer(4096), 1 << 20), h.aio_flush()]
h.aio_disconnect()
# The request to leave is on its way before anything can be answered.
while h.aio_get_direction() & nbd.AIO_DIRECTION_WRITE:
    h.poll(-1)
open(gate, "w").close()
while not h.aio_is_closed():
    assert not h.aio_is_dead()
    h.poll(-1)
assert all(h.aio_command_completed(cookie) for cookie in held), "an answer is missing"

again = nbd.NBD()
again.connect_uri(uri)
assert again.pread(8 * 4096, 0) == b"w" * (8 * 4096)
again.shutdown()
