"""Taking guests over a reboot of the host: what is written down before, and held against what is there after."""
