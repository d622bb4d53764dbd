"""Everything at once: four connections, each with a deep queue on its own quarter of the disk; a flush by one of
them; and what one wrote is read by another.

pipeline.py URI
"""
import random
import sys
import nbd

DEPTH, STEPS, BLOCK = 48, 1500, 4096
uri = sys.argv[1]
random.seed(7)


class Quarter:
    """One connection's part of the disk, and what it has to hold."""

    def __init__(self, number):
        self.h = nbd.NBD()
        self.h.connect_uri(uri)
        assert self.h.can_multi_conn()
        self.len = self.h.get_size() // 4
        self.start = self.len * number
        self.truth = bytearray(self.h.pread(self.len, self.start))
        self.in_flight = {}

    def ask(self):
        blocks = self.len // BLOCK
        first = random.randrange(blocks)
        count = random.randrange(1, 17)
        at, length = first * BLOCK, min(count, blocks - first) * BLOCK
        if any(at < other + size and other < at + length for other, size, _ in self.in_flight.values()):
            return
        place = slice(at, at + length)
        what = random.randrange(4)
        # Buffers live as long as their commands.
        if what == 0:
            buffer = nbd.Buffer(length)
            cookie = self.h.aio_pread(buffer, self.start + at)
            self.in_flight[cookie] = (at, length, (buffer, bytes(self.truth[place])))
            return
        if what == 1:
            flags = random.choice([0, nbd.CMD_FLAG_NO_HOLE])
            cookie, data = self.h.aio_zero(length, self.start + at, flags=flags), None
            self.truth[place] = bytes(length)
        else:
            data = nbd.Buffer.from_bytearray(bytearray(random.randbytes(length)))
            flags = random.choice([0, 0, 0, nbd.CMD_FLAG_FUA])
            cookie = self.h.aio_pwrite(data, self.start + at, flags=flags)
            self.truth[place] = data.to_bytearray()
        self.in_flight[cookie] = (at, length, data)

    def take(self):
        for cookie in [cookie for cookie in self.in_flight if self.h.aio_command_completed(cookie)]:
            at, _, what = self.in_flight.pop(cookie)
            if isinstance(what, tuple):
                buffer, truth = what
                assert buffer.to_bytearray() == truth, f"a read at {self.start + at}"


quarters = [Quarter(number) for number in range(4)]
for step in range(STEPS):
    quarter = quarters[step % 4]
    if len(quarter.in_flight) >= DEPTH:
        quarter.h.poll(-1)
        quarter.take()
    quarter.ask()
for quarter in quarters:
    while quarter.in_flight:
        quarter.h.poll(-1)
        quarter.take()
quarters[0].h.flush()
for reader, quarter in zip(quarters[1:] + quarters[:1], quarters):
    assert reader.h.pread(quarter.len, quarter.start) == quarter.truth, f"the quarter at {quarter.start}"
for quarter in quarters:
    quarter.h.shutdown()
