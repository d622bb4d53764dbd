"""What every part needs."""
import os
import subprocess

MIB = 1 << 20


def run(*words, **options):
    return subprocess.run([str(word) for word in words], check=True, capture_output=True, text=True, **options)
