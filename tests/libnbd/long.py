"""64-bit requests, where this libnbd has them (1.18): one for more than 4 GiB.

long.py URI
"""
import sys
import nbd

h = nbd.NBD()
if not hasattr(h, "get_extended_headers_negotiated"):
    print("this libnbd has no extended headers")
    sys.exit()
h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
h.connect_uri(sys.argv[1])
assert h.get_extended_headers_negotiated()
size = h.get_size()
assert size > 1 << 32
h.pwrite(b"x" * 4096, 0)
h.pwrite(b"x" * 4096, size - 4096)
h.zero(size, 0)
assert h.pread(4096, 0) == h.pread(4096, size - 4096) == bytes(4096)
found = []
h.block_status_64(size, 0, lambda context, offset, entries, error: found.extend(entries))
assert found == [(size, 3)], found
h.shutdown()
