"""The kernel: system calls and /proc, one thin function each. Knows no QEMU."""
