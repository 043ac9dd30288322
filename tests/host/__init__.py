"""A whole host under test: a VM that plays the host, with the kernels, the systemd and the KVM that this machine lacks.

`kernels` and `image` make it from Debian's packages, `vm` runs it, `guests` starts guests in it, `inside` is what runs
in it.  ``python -m tests.host --shell`` opens a shell there.
"""
