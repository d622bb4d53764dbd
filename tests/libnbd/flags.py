"""What the flags of commands ask for: DF, REQ_ONE, NO_HOLE, FAST_ZERO; and what they may not.

flags.py URI SLOW_URI: the second disk cannot make zeroes but by writing them.
"""
import errno
import sys
import nbd

KIB = 1 << 10
uri, slow_uri = sys.argv[1:]


def connected(uri):
    h = nbd.NBD()
    for context in [nbd.CONTEXT_BASE_ALLOCATION, "qemu:allocation-depth"]:
        h.add_meta_context(context)
    h.connect_uri(uri)
    return h


h = connected(uri)
assert h.can_df() and h.can_fua() and h.can_zero() and h.can_fast_zero() and h.can_trim() and h.can_cache()
h.pwrite(b"x" * (64 * KIB), 64 * KIB)


def chunks(flags):
    found = []
    data = h.pread_structured(256 * KIB, 0, lambda piece, at, kind, _: found.append((at, kind)), flags=flags)
    assert data == bytes(64 * KIB) + b"x" * (64 * KIB) + bytes(128 * KIB)
    return found


in_pieces = chunks(0)
assert sorted(in_pieces) == [(0, nbd.READ_HOLE), (64 * KIB, nbd.READ_DATA), (128 * KIB, nbd.READ_HOLE)], in_pieces
assert chunks(nbd.CMD_FLAG_DF) == [(0, nbd.READ_DATA)]


def extents(length, offset, flags=0):
    found = {}
    h.block_status(length, offset, lambda context, _, entries, error: found.update({context: entries}), flags=flags)
    return found


# Pairs of a length and what it is.
assert extents(256 * KIB, 0)["base:allocation"] == [64 * KIB, 3, 64 * KIB, 0, 128 * KIB, 3]
for length, offset in [(256 * KIB, 0), (100, 64 * KIB + 7), (192 * KIB, 64 * KIB)]:
    one = extents(length, offset, nbd.CMD_FLAG_REQ_ONE)
    assert set(one) == {nbd.CONTEXT_BASE_ALLOCATION, "qemu:allocation-depth"}
    for entries in one.values():
        assert len(entries) == 2 and 0 < entries[0] <= length, entries

h.zero(64 * KIB, 64 * KIB, flags=nbd.CMD_FLAG_NO_HOLE)
assert extents(64 * KIB, 64 * KIB)["base:allocation"][1] & nbd.STATE_ZERO or h.pread(64 * KIB, 64 * KIB) == bytes(64 * KIB)
h.pwrite(b"y" * (1 << 20), 0)
h.zero(1 << 20, 0, flags=nbd.CMD_FLAG_FAST_ZERO)
assert h.pread(1 << 20, 0) == bytes(1 << 20)
assert extents(1 << 20, 0)["base:allocation"] == [1 << 20, 3]

slow = connected(slow_uri)
before = slow.pread(1 << 20, 0)
assert before != bytes(1 << 20)
try:
    slow.zero(1 << 20, 0, flags=nbd.CMD_FLAG_FAST_ZERO)
    raise AssertionError("it has to be refused")
except nbd.Error as error:
    assert error.errnum == errno.ENOTSUP, error
assert slow.pread(1 << 20, 0) == before, "a refusal changes nothing"
slow.zero(1 << 20, 0)
assert slow.pread(1 << 20, 0) == bytes(1 << 20)

# Past what a client of good manners sends: each is refused, and the connection goes on.
h.set_strict_mode(0)
for wrong in [
    lambda: h.pread(512, h.get_size()),
    lambda: h.pwrite(b"z" * 512, h.get_size() - 511),
    lambda: h.pread(0, 0),
    lambda: h.trim(512, 0, flags=nbd.CMD_FLAG_REQ_ONE),
    lambda: h.pread(512, 0, flags=nbd.CMD_FLAG_FAST_ZERO),
]:
    try:
        wrong()
        raise AssertionError("it has to be refused")
    except nbd.Error as error:
        assert error.errnum in (errno.EINVAL, errno.ENOSPC), error
assert h.pread(512, h.get_size() - 512) == bytes(512)
for one in [h, slow]:
    one.shutdown()
