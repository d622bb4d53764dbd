"""What every part needs."""
import os
import subprocess
import sys
import time
from pathlib import Path

MIB = 1 << 20


def run(*words, **options):
    return subprocess.run([str(word) for word in words], check=True, capture_output=True, text=True, **options)


def settle(cold=True):
    """Nothing is left to be written and, where `cold`, nothing in the page cache."""
    os.sync()
    if not cold:
        return
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        pass


def watched(words):
    """Runs a command to its end: seconds, CPU seconds, peak memory."""
    begun = time.monotonic()
    child = subprocess.Popen([str(word) for word in words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    said = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"benches/peers: {words} ended with {child.returncode}: {said.decode()}")
    used = usage.ru_utime + usage.ru_stime
    return {"wall": time.monotonic() - begun, "cpu": used, "peak_mib": usage.ru_maxrss / 1024}
