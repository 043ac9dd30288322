"""cpr: update the QEMU under running guests without anybody noticing."""
