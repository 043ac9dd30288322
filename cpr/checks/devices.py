"""Devices and back ends: what can be handed to a second QEMU while the first one holds it, and what cannot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cpr.checks.registry import BOTH, blocker, check, note, warning
from cpr.checks.words import some
from cpr.qemu.cmdline import displays

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cpr.model import Chardev, Finding, Guest
    from cpr.qemu.cmdline import CommandLine

HANDOVER = ("handover",)
ANEW = ("handover", "reexec")
"""Engines whose new QEMU opens its back ends anew by its command line, but for what can be passed by descriptor. What
cannot be opened a second time is lost, and with re-exec that shows when the old QEMU is gone."""

MOVABLE_CHARDEVS = frozenset(
    {"socket", "file", "null", "vc", "ringbuf", "memory", "hub", "mux", "testdev", "gdb", "unknown"}
)
"""Back ends that a second QEMU can have at the same time, or be given by descriptor. `unknown` is not on the command
line: that is drift."""

_WHY_NOT = {
    "pty": "a pty belongs to the QEMU that made it, and the other end would see a hang-up",
    "stdio": "two QEMUs cannot share a terminal",
    "pipe": "two QEMUs would read from one pipe and take each other's input",
    "udp": "its local port is held by the old QEMU",
    "serial": "two QEMUs would read from one serial line",
    "parallel": "a parallel port is held exclusively",
    "spicevmc": "it ends with its SPICE connection",
    "spiceport": "it ends with its SPICE connection",
    "qemu-vdagent": "it belongs to the display of the old QEMU",
    "dbus": "its D-Bus connection cannot be handed on",
    "braille": "its connection to brltty cannot be handed on",
}


KEPT_BY_EXEC = frozenset(
    {"pty", "stdio", "pipe", "udp", "serial", "parallel", "spicevmc", "spiceport", "qemu-vdagent"}
)
"""Back ends of `_WHY_NOT` that one process after the other can have: their descriptors stay, or are opened again."""


@check("chardev-not-movable", "A character device that cannot be handed on", engines=ANEW)
def chardev_not_movable(guest: Guest) -> Iterator[Finding]:
    """Sockets, files and what has no other end can be; see `_WHY_NOT` for the others."""
    stdin_is_null = any(f.number == 0 and f.target == "/dev/null" for f in guest.open_files)
    for chardev in guest.chardevs:
        if chardev.backend == "stdio" and stdin_is_null:
            continue
        why = _why_not_movable(chardev)
        if why and chardev.in_argv:
            yield blocker(
                chardev.label,
                f"chardev {chardev.label} ({chardev.backend}) cannot be handed to a second QEMU: {why}",
                "use a UNIX socket the next time: -chardev socket,id=ID,path=PATH,server=on,wait=off",
                engines=HANDOVER if chardev.backend in KEPT_BY_EXEC or why == _FOCUS else ANEW,
            )


def _why_not_movable(chardev: Chardev) -> str:
    if chardev.backend == "socket":
        return _why_not_socket(chardev)
    if chardev.backend in _WHY_NOT:
        return _WHY_NOT[chardev.backend]
    return "" if chardev.backend in MOVABLE_CHARDEVS else "cpr does not know how"


_FOCUS = "it is multiplexed (mux=on), and who has the focus is known inside QEMU only"


def _why_not_socket(chardev: Chardev) -> str:
    if chardev.plain and not chardev.movable:
        return _FOCUS
    if chardev.server:
        return "" if chardev.listener is not None else "no descriptor of the process is its listener"
    if chardev.reconnect or not chardev.plain:
        return ""
    if not chardev.connected:
        return "it is disconnected for good, but the new QEMU would dial again, and not start if nobody answers"
    return "" if chardev.client is not None else "no descriptor of the process is its connection"


@check("chardev-framing", "A connection whose framing lives inside QEMU")
def chardev_framing(guest: Guest) -> Iterator[Finding]:
    """telnet, tn3270, websocket and TLS: the listener is handed on, what was negotiated with a client is not."""
    for chardev in guest.chardevs:
        if chardev.plain or not chardev.connected:
            continue
        if chardev.server or chardev.reconnect:
            again = "the client has to connect again" if chardev.server else "QEMU connects again by itself"
            yield warning(chardev.label, f"will disconnect: {chardev.filename} has framing inside QEMU; {again}")
        else:
            yield blocker(
                chardev.label,
                f"{chardev.filename} is an outgoing connection with framing inside QEMU: it would be lost for good",
                "give it reconnect=SECONDS the next time, or a plain socket",
            )


@check("monitor-client", "A client of a monitor will be disconnected")
def monitor_client(guest: Guest) -> Iterator[Finding]:
    """What was negotiated with it (and half a command, perhaps) ends with the old QEMU. Those that wait are served."""
    ours = guest.monitor.label if guest.monitor else ""
    for chardev in guest.chardevs:
        if not chardev.monitor or chardev.backend != "socket":
            continue
        if chardev.connected and chardev.label != ours:
            yield blocker(
                chardev.label,
                f"a client is connected to the monitor {chardev.label} and will be disconnected: a monitor's session "
                "cannot be handed on",
                "end that session, or --ignore monitor-client if it copes with a hang-up"
                + ("; --engine reexec keeps it" if chardev.lends_session or chardev.lends_prompt else ""),
                engines=HANDOVER if chardev.lends_session or chardev.lends_prompt else (),
            )
            if chardev.lends_prompt:
                yield note(
                    chardev.label,
                    f"who is connected to the human monitor {chardev.label} stays so if nothing is typed there when "
                    "the guest is about to be saved; else the update is undone, and can be tried again",
                    engines=("reexec",),
                )


@check("client-queued", "A client waits in a busy listener's queue")
def client_queued(guest: Guest) -> Iterator[Finding]:
    """The new QEMU would take the one that waits, and the one that is connected would find its place taken."""
    for chardev in guest.chardevs:
        if chardev.queued and chardev.connected and not chardev.monitor:
            yield blocker(
                chardev.label,
                f"{chardev.queued} client(s) wait for {chardev.label}, which serves one at a time: the new QEMU would "
                "take the one that waits instead of the one that is connected",
                "end the client that waits",
            )


@check("vnc-client", "VNC clients will reconnect")
def vnc_client(guest: Guest) -> Iterator[Finding]:
    """The listener is handed on; what was agreed with a client is inside QEMU."""
    for server in guest.vnc:
        if server.clients:
            yield warning(
                server.id,
                f"will disconnect: {server.clients} VNC client(s), whose sessions are inside QEMU; viewers have to "
                "connect again",
            )


@check("vnc-password", "A VNC password that was set over QMP", modes=BOTH)
def vnc_password(guest: Guest, command: CommandLine) -> Iterator[Finding]:
    """Nobody can read it back. Until it is set again nobody can log in."""
    given = {d.vnc.id for d in displays(command) if d.vnc is not None and d.vnc.password_secret}
    wanted = {d.vnc.id for d in displays(command) if d.vnc is not None and d.vnc.password}
    for server in guest.vnc:
        if server.id not in given and (server.id in wanted or server.auth.endswith("vnc")):
            yield warning(
                server.id,
                "the VNC password was set over QMP and cannot be read back: after the update nobody can log in until "
                "it is set again",
                "set_password after the update, or use password-secret= at the next start",
            )


@check("vnc-websocket", "VNC over websockets", engines=ANEW)
def vnc_websocket(guest: Guest, command: CommandLine) -> Iterator[Finding]:
    """display-update knows no websocket listener; in its own process QEMU gets it when it binds the address.

    That is so for TCP at the address that the command line names: the path of a UNIX socket is removed before it is
    bound, and in a range (`to`) QEMU takes the next port where one is taken.
    """
    hint = "start the guest the next time without websocket= (a proxy such as websockify does it outside)"
    ranges = {d.vnc.id for d in displays(command) if d.vnc is not None and d.vnc.to}
    for server in guest.vnc:
        if not server.websocket:
            continue
        what = "its websocket listener cannot be handed on"
        why = ""
        if any(listener.family not in ("ipv4", "ipv6") for listener in server.listeners):
            why = "it has a UNIX socket, too, whose path the new QEMU would remove"
        elif any(listener.number is None for listener in server.listeners):
            why = "no descriptor of the process is its listener"
        elif server.id in ranges:
            why = "its port is one of a range (to=)"
        if why:
            yield blocker(server.id, f"{what}: {why}", hint, engines=("reexec",))
        yield blocker(
            server.id,
            f"{what} to another process: QEMU takes no descriptor for it",
            hint if why else "--engine reexec keeps it",
            engines=HANDOVER,
        )


_LOCAL = {"gtk", "sdl", "curses", "cocoa", "dbus", "egl-headless", "spice-app"}


@check("display-local", "A display that belongs to the process")
def display_local(command: CommandLine) -> Iterator[Finding]:
    """A window, a terminal or a GPU context cannot be handed on."""
    for display in displays(command):
        if display.kind in _LOCAL:
            yield blocker(
                display.kind,
                f"the {display.kind} display belongs to the process and would close with it; a second one would open "
                "beside it meanwhile",
                "use -vnc or -display none at the next start",
            )


@check("spice", "SPICE", engines=ANEW)
def spice(guest: Guest) -> Iterator[Finding]:
    """Its listener and its sessions are inside libspice-server, which takes neither from outside.

    In its own process QEMU gets the listener when it binds the address; the sessions end.
    """
    if not guest.spice:
        return
    yield blocker(
        "spice",
        "the SPICE server's listener cannot be handed on: the new QEMU would find the port taken",
        "--engine reexec keeps it; or use VNC at the next start",
        engines=HANDOVER,
    )
    clients = [file for file in guest.open_files if (file.owner, file.kind) == ("spice", "socket")]
    if clients:
        yield warning(
            "spice",
            f"will disconnect: a SPICE client ({len(clients)} connections), whose session is inside QEMU; it has to "
            "connect again",
            engines=("reexec",),
        )


@check("spice-password", "A SPICE password that was set over QMP", modes=BOTH)
def spice_password(guest: Guest, command: CommandLine) -> Iterator[Finding]:
    """Nobody can read it back. Until it is set again nobody can log in."""
    given = [d.params for d in displays(command) if d.kind == "spice"]
    if guest.spice == "spice" and not any("password" in p or "password-secret" in p for p in given):
        yield warning(
            "spice",
            "the SPICE password was set over QMP and cannot be read back: after the update nobody can log in until it "
            "is set again",
            "set_password after the update, or use password-secret= at the next start",
        )


@check("listener-unknown", "A listener whose owner is not known", engines=ANEW)
def listener_unknown(guest: Guest) -> Iterator[Finding]:
    """Every listening socket is somebody's; one that is not would close, and its clients find nobody."""
    for file in guest.open_files:
        if file.kind == "listener" and not file.owner:
            yield blocker(
                f"fd {file.number}",
                f"the process listens at {file.target}, and nothing on its command line or in its monitor says what "
                "for: it would be gone after the update",
                "end what opened it (nbd-server-stop, an export), or --ignore listener-unknown",
            )


@check("listener-gap", "A listener that is away for a moment", engines=ANEW)
def listener_gap(guest: Guest) -> Iterator[Finding]:
    """QEMU takes no descriptor for these; they are opened anew when the old QEMU is gone."""
    for netdev in guest.netdevs:
        if netdev.hostfwd:
            yield note(
                netdev.id,
                f"forwarded ports ({some(netdev.hostfwd)}) are opened anew once the old QEMU is gone: for some "
                "milliseconds nobody listens",
            )
    for chardev in guest.chardevs:
        if chardev.label == "gdb":
            words = "will disconnect: a debugger, if there is one; the gdb stub listens again once the old QEMU is gone"
            yield warning(chardev.filename.removeprefix("disconnected:"), words)


MOVABLE_NETDEVS = frozenset({"tap", "bridge", "user", "hubport", "none", "nic"})

_NETDEV_HINT = "use a tap device at the next start"


@check("netdev-unsupported", "A network back end that cannot be handed on", engines=ANEW)
def netdev_unsupported(guest: Guest) -> Iterator[Finding]:
    """Taps are handed on by descriptor, user networking starts anew; the others hold something exclusively."""
    for netdev in guest.netdevs:
        if netdev.type not in MOVABLE_NETDEVS:
            yield blocker(
                netdev.id,
                f"network back end {netdev.id} is of type {netdev.type}, whose connection or ring cannot be handed to "
                "a second QEMU",
                _NETDEV_HINT,
            )
        elif netdev.type in ("tap", "bridge") and not netdev.fds and netdev.in_argv:
            yield blocker(
                netdev.id,
                f"no descriptor of the process is the tap of {netdev.id}"
                + (f" ({netdev.ifname})" if netdev.ifname else ""),
                "run cpr as root if descriptors could not be read",
            )


@check("slirp-connections", "User networking keeps no connection")
def slirp_connections(guest: Guest) -> Iterator[Finding]:
    """The TCP stack of -netdev user is inside QEMU; its host-side sockets close with it."""
    for netdev in guest.netdevs:
        if netdev.type == "user":
            yield warning(
                netdev.id,
                "connections through user networking (slirp) are cut: their sockets are inside the old QEMU",
                "use a tap device at the next start if that matters",
            )


@dataclass(frozen=True, slots=True)
class Held:
    """Device models (by the beginnings of their names) that hold something which only one process can have."""

    prefixes: tuple[str, ...]
    why: str
    way_out: str = "unplug it for the update (device_del), and plug it in again afterwards"

    def findings(self, guest: Guest) -> list[Finding]:
        return [
            blocker(device.id, f"device {device.id} ({device.type}): {self.why}", self.way_out)
            for device in guest.devices
            if device.type.startswith(self.prefixes)
        ]


VFIO = Held(
    ("vfio-",),
    "a passed-through device is bound to the QEMU that opened it, and its DMA to that QEMU's map of memory",
    "where its agent can suspend the guest, cpr save GUEST FILE --mode restart and cpr load FILE: it sleeps meanwhile; "
    "or unplug it for the update (device_del)",
)
VSOCK = Held(
    ("vhost-vsock-",),
    "its CID is exclusive on this host, and a second QEMU cannot take it meanwhile",
    "--engine reexec, where there is no second QEMU; or unplug it for the update (device_del)",
)
VHOST_USER = Held(
    ("vhost-user-", "vhost-user"), "what serves it (virtiofsd, SPDK, ...) serves one QEMU and ends with its connection"
)
EXCLUSIVE = (
    Held(("vhost-vdpa-",), "the vDPA device, and its state, is held by the QEMU that opened it"),
    Held(("vhost-scsi-",), "its target's endpoint is bound to the QEMU that opened it"),
    Held(("usb-host",), "libusb has claimed the host's device for the QEMU that opened it"),
    Held(("ivshmem-doorbell",), "its place at the ivshmem server ends with its connection"),
)


@check("vfio", "A device of the host, passed through", ignorable=False, engines=ANEW)
def vfio(guest: Guest) -> Iterator[Finding]:
    """vfio-pci and mdev: two QEMUs cannot have one device, and it is reset when the first one lets go of it."""
    found = VFIO.findings(guest)
    yield from found
    held = [f for f in guest.open_files if f.kind == "vfio"]
    if held and not found:
        yield blocker(f"fd {held[0].number}", f"the process holds {held[0].target}: {VFIO.why}", VFIO.way_out)


@check("vhost-vsock", "A vsock device", ignorable=False, engines=HANDOVER)
def vhost_vsock(guest: Guest) -> Iterator[Finding]:
    """The CID is the guest's address on the host, and there is one of it."""
    yield from VSOCK.findings(guest)


@check("vhost-user", "A device served by another process", engines=ANEW)
def vhost_user(guest: Guest) -> Iterator[Finding]:
    """virtiofs, vhost-user-blk, -scsi, -gpu, ..."""
    yield from VHOST_USER.findings(guest)


@check("device-exclusive", "A device that one QEMU can have", engines=ANEW)
def device_exclusive(guest: Guest) -> Iterator[Finding]:
    """vDPA, vhost-scsi, usb-host, ivshmem-doorbell."""
    for held in EXCLUSIVE:
        yield from held.findings(guest)


@check("tpm", "A TPM", engines=ANEW)
def tpm(command: CommandLine) -> Iterator[Finding]:
    """An emulator's state and connection, or the host's chip."""
    for _, option in command.find("tpmdev"):
        kind = option.params.get("type") or "?"
        what = {
            "emulator": "swtpm serves one QEMU, ends with its connection, and its volatile state with it",
            "passthrough": "the host's TPM has one user and cannot be migrated",
        }.get(kind, "cpr does not know how to hand it on")
        yield blocker(option.params.get("id") or "tpm", f"-tpmdev {kind}: {what}", "shut the guest down to update it")
