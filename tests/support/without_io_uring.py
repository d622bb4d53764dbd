"""Runs a program that gets an error for a system call of io_uring:

    without_io_uring.py setup|register:REQUEST ERRNO PROGRAM WORD...
"""
import ctypes
import os
import struct
import sys

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
LOAD_WORD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06
CALL, SECOND_ARGUMENT = 0, 24
IO_URING_SETUP, IO_URING_REGISTER = 425, 427
ALLOW, ERRNO = 0x7FFF0000, 0x00050000

name, _, request = sys.argv[1].partition(":")
call = {"setup": IO_URING_SETUP, "register": IO_URING_REGISTER}[name]
lines = [
    (LOAD_WORD, 0, 0, CALL),
    (JUMP_IF_EQUAL, 0, 3 if request else 1, call),
]
if request:
    lines += [
        (LOAD_WORD, 0, 0, SECOND_ARGUMENT),
        (JUMP_IF_EQUAL, 0, 1, int(request)),
    ]
lines += [
    (RETURN, 0, 0, ERRNO | int(sys.argv[2])),
    (RETURN, 0, 0, ALLOW),
]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))


class Program(ctypes.Structure):
    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_void_p)]


libc = ctypes.CDLL(None, use_errno=True)
program = Program(len(lines), ctypes.addressof(code))
assert libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
assert libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0) == 0, ctypes.get_errno()
os.execvp(sys.argv[3], sys.argv[3:])
