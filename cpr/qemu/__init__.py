"""QEMU itself: its monitor, its command line, its memory and its migration; knows no engine."""
