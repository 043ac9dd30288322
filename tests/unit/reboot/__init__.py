"""What is written down before a reboot, on values and on small files."""
