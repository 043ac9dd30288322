"""Reading, editing and rebuilding a running QEMU's command line. Import everything from here.

    parse:    CommandLine.parse(argv), Option.params -> Params
    ask:      chardevs(c), monitors(c), memory_backends(c), guest_memory(c), netdevs(c), displays(c), drives(c), ...
    edit:     with_chardev_fd(c, "serial0", 17, server=True), for_incoming(c), ...: CommandLine -> CommandLine

Pure functions, no I/O. What another QEMU version calls an option is `cpr.qemu.options`; -readconfig files are
`cpr.qemu.readconfig`.
"""

from cpr.qemu.cmdline.argv import POSITIONAL, CommandLine, Option, UnknownOption
from cpr.qemu.cmdline.descriptors import fd_numbers, with_fd_number, with_fd_numbers
from cpr.qemu.cmdline.edit import (
    append_options,
    for_incoming,
    remove_appended,
    with_generation_id,
    with_machine_type,
    with_program,
    without,
    without_gdb,
    without_user,
)
from cpr.qemu.cmdline.edit_chardevs import (
    with_chardev_address,
    with_chardev_fd,
    with_chardev_null,
    with_log_append,
    without_waiting,
)
from cpr.qemu.cmdline.edit_memory import (
    with_memory_backend_fd,
    with_memory_backend_file,
    with_memory_backend_memfd,
    without_reservation,
)
from cpr.qemu.cmdline.edit_net import (
    with_hostfwd,
    with_netdev_fds,
    with_netdev_name,
    with_netdev_null,
    without_hostfwd,
)
from cpr.qemu.cmdline.edit_vnc import with_spice_deaf, with_vnc_addresses, with_vnc_detached
from cpr.qemu.cmdline.normalise import implicit_chardevs, normalise_chardevs
from cpr.qemu.cmdline.params import CommandLineError, Params, parse_params, parse_size
from cpr.qemu.cmdline.queries import (
    add_fds,
    devices,
    gdbstub,
    guest_memory,
    machine,
    memory_backends,
    objects,
    settings,
)
from cpr.qemu.cmdline.query_io import chardevs, displays, drives, monitors, netdevs
from cpr.qemu.cmdline.rehearsal import for_rehearsal, not_rehearsed

__all__ = [
    "POSITIONAL",
    "CommandLine",
    "CommandLineError",
    "Option",
    "Params",
    "UnknownOption",
    "add_fds",
    "append_options",
    "chardevs",
    "devices",
    "displays",
    "drives",
    "fd_numbers",
    "for_incoming",
    "for_rehearsal",
    "gdbstub",
    "guest_memory",
    "implicit_chardevs",
    "machine",
    "memory_backends",
    "monitors",
    "netdevs",
    "normalise_chardevs",
    "not_rehearsed",
    "objects",
    "parse_params",
    "parse_size",
    "remove_appended",
    "settings",
    "with_chardev_address",
    "with_chardev_fd",
    "with_chardev_null",
    "with_fd_number",
    "with_fd_numbers",
    "with_generation_id",
    "with_hostfwd",
    "with_log_append",
    "with_machine_type",
    "with_memory_backend_fd",
    "with_memory_backend_file",
    "with_memory_backend_memfd",
    "with_netdev_fds",
    "with_netdev_name",
    "with_netdev_null",
    "with_program",
    "with_spice_deaf",
    "with_vnc_addresses",
    "with_vnc_detached",
    "without",
    "without_gdb",
    "without_hostfwd",
    "without_reservation",
    "without_user",
    "without_waiting",
]
