"""Drives: device -> node -> files, with the sizes that a rehearsal needs.

Parsers of `query-block` and `query-named-block-nodes`. A chain is what the device really uses today: after a snapshot
that is an overlay, whatever argv says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cpr.model import BlockChain, BlockNode
from cpr.qemu.answers import flag, mapping, mappings, number, text

if TYPE_CHECKING:
    from cpr.qemu.answers import Answers

PERIPHERAL = "/machine/peripheral/"
VIRTIO_BACKEND = "/virtio-backend"
THROTTLING = (
    *("bps", "bps_rd", "bps_wr", "bps_max", "bps_rd_max", "bps_wr_max"),
    *("bps_max_length", "bps_rd_max_length", "bps_wr_max_length"),
    *("iops", "iops_rd", "iops_wr", "iops_max", "iops_rd_max", "iops_wr_max"),
    *("iops_max_length", "iops_rd_max_length", "iops_wr_max_length", "iops_size"),
)
"""Fields of BlockDeviceInfo (qapi/block-core.json)."""


def chains(answers: Answers) -> tuple[BlockChain, ...]:
    return answers.read("query-block", parse_chains, ())


def nodes(answers: Answers) -> tuple[BlockNode, ...]:
    return answers.read("query-named-block-nodes", parse_nodes, (), flat=True)


def parse_chains(reply: Any) -> tuple[BlockChain, ...]:
    """One for each block backend; a drive without a medium has no node and no files.

    A drive without a medium that is in no device either is left out: it is nothing, and which of them QEMU makes by
    itself differs between versions (sd0, up to 9.x).
    """
    return tuple(_chain(e) for e in mappings(reply) if e.get("qdev") or e.get("inserted") is not None)


def _chain(entry: dict[str, Any]) -> BlockChain:
    drive = text(entry.get("device", ""))
    device = device_of(text(entry.get("qdev", ""))) or drive
    inserted = entry.get("inserted")
    if inserted is None:
        return BlockChain(device=device, drive=drive, node="", files=(), read_only=False)
    inserted = mapping(inserted)
    image = mapping(inserted["image"])
    return BlockChain(
        device=device,
        drive=drive,
        node=text(inserted.get("node-name", "")),
        files=image_files(image),
        read_only=flag(inserted["ro"]),
        size=number(image["virtual-size"]),
        throttle=tuple((key, number(inserted[key])) for key in THROTTLING if inserted.get(key)),
    )


def device_of(qdev: str) -> str:
    """The id where the device has one, else its QOM path: `/machine/peripheral/vd0/virtio-backend` -> `vd0`."""
    if qdev.startswith(PERIPHERAL):
        return qdev[len(PERIPHERAL) :].removesuffix(VIRTIO_BACKEND)
    return qdev.removesuffix(VIRTIO_BACKEND)


def image_files(image: dict[str, Any]) -> tuple[str, ...]:
    """File names of an image and of everything behind it, each with its external data file."""
    files: list[str] = []
    layer: Any = image
    while layer is not None:
        layer = mapping(layer)
        files.append(text(layer["filename"]))
        specific = layer.get("format-specific")
        data = mapping(specific).get("data") if specific is not None else None
        data_file = data.get("data-file") if isinstance(data, dict) else None
        if data_file:
            files.append(text(data_file))
        layer = layer.get("backing-image")
    return tuple(files)


def parse_nodes(reply: Any) -> tuple[BlockNode, ...]:
    return tuple(
        BlockNode(
            name=text(entry["node-name"]),
            driver=text(entry["drv"]),
            filename=text(mapping(entry["image"])["filename"]),
            size=number(mapping(entry["image"])["virtual-size"]),
            read_only=flag(entry["ro"]),
        )
        for entry in mappings(reply)
    )


def disk_sizes(drives: tuple[BlockChain, ...], named: tuple[BlockNode, ...]) -> dict[str, int]:
    """Virtual sizes in bytes by drive id and by node name."""
    sizes = {node.name: node.size for node in named}
    sizes.update({chain.drive: chain.size for chain in drives if chain.drive and chain.node})
    return sizes
