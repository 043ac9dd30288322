"""QEMU's two notations for the parameters of an option."""

from __future__ import annotations

import itertools
import random

import pytest

from cpr.qemu.cmdline import CommandLineError, Params, parse_params, parse_size
from cpr.qemu.cmdline.params import parse_bool, parse_keyval, split_commas


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", [""]),
        ("a", ["a"]),
        ("a,b", ["a", "b"]),
        ("a,,b", ["a,b"]),
        ("a,,,b", ["a,", "b"]),
        ("a,,,,b", ["a,,b"]),
        (",,b", [",b"]),
        ("a,,", ["a,"]),
        ("a,", ["a", ""]),
    ],
)
def test_commas(text: str, parts: list[str]) -> None:
    assert split_commas(text) == parts


def test_any_values_survive_the_way_there_and_back() -> None:
    alphabet = [",", "=", "a", "no", "{", " ", "."]
    for count in range(1, 6):
        for letters in itertools.product(alphabet, repeat=count):
            value = "".join(letters)
            params = Params.of(None, id="x", path=value, server="on")
            again = parse_keyval(params.render())
            assert again.get("path") == value, value
            assert again == params


def test_random_edits_keep_the_rest() -> None:
    dice = random.Random(7)  # noqa: S311
    keys = ["path", "id", "server", "wait", "fd", "logfile"]
    for _ in range(500):
        params = parse_keyval("socket,path=/a,,b,server,nowait,id=z", "backend")
        expected = {"backend": "socket", "path": "/a,b", "server": "on", "wait": "off", "id": "z"}
        for _ in range(6):
            key = dice.choice(keys)
            if dice.random() < 0.4:
                params = params.without(key)
                expected.pop(key, None)
            else:
                expected[key] = dice.choice(["on", "off", "/x,y", ""])
                params = params.with_({key: expected[key]})
        again = parse_keyval(params.render(), "backend")
        assert {key: again.get(key) for key in again.names()} == expected


def test_flags_and_the_implied_key() -> None:
    params = parse_keyval("socket,path=/p,server,nowait", "backend")
    assert [params.get(k) for k in ("backend", "server", "wait")] == ["socket", "on", "off"]
    assert params.render() == "socket,path=/p,server,nowait"
    assert params.with_({"wait": True}).render() == "socket,path=/p,server,wait=on"
    assert params.with_({"backend": "pty"}).render() == "pty,path=/p,server,nowait"
    assert params.without("server", "wait").render() == "socket,path=/p"


def test_a_first_item_with_a_comma_is_the_implied_value() -> None:
    assert parse_keyval("a,,b=c,debug-threads=on", "guest").get("guest") == "a,b=c"


def test_duplicates_are_kept_and_the_last_one_counts() -> None:
    params = parse_keyval("user,hostfwd=tcp::1-:1,hostfwd=tcp::2-:2", "type")
    assert params.all("hostfwd") == ("tcp::1-:1", "tcp::2-:2")
    assert params.get("hostfwd") == "tcp::2-:2"
    assert params.with_({"hostfwd": "x"}).render() == "user,hostfwd=x"


def test_dotted_keys() -> None:
    params = parse_keyval("qcow2,node-name=n,file.driver=file,file.filename=/a", "driver")
    assert params.get("file.filename") == "/a"
    assert "file" in params
    assert params.without("file").render() == "qcow2,node-name=n"


def test_bare_words_where_there_may_be_none() -> None:
    with pytest.raises(CommandLineError, match="share"):
        parse_keyval("memory-backend-file,share", "qom-type", flags=False)


def test_json() -> None:
    text = '{"driver":"qcow2","node-name":"n","file":{"driver":"file","filename":"/a,b"},"read-only":false,"size":5}'
    params = parse_params(text, "driver")
    assert params.render() == text
    assert [params.get(k) for k in ("file.filename", "read-only", "size", "file", "nothing")] == [
        *("/a,b", "off", "5", None, None)
    ]
    assert params.names() == ("driver", "node-name", "file.driver", "file.filename", "read-only", "size")
    changed = params.with_({"file.filename": "/c", "read-only": True}).without("node-name", "size")
    assert changed.render() == '{"driver":"qcow2","file":{"driver":"file","filename":"/c"},"read-only":true}'
    assert params.render() == text, "the original is not changed"


def test_json_lists() -> None:
    params = parse_params('{"type":"user","id":"n","hostfwd":[{"str":"tcp::1-:1"},{"str":"udp::2-:2"}]}')
    assert params.all("hostfwd") == ("tcp::1-:1", "udp::2-:2")
    assert params.without("hostfwd").render() == '{"type":"user","id":"n"}'
    assert parse_params('{"host-nodes":[0,1]}').all("host-nodes") == ("0", "1")


@pytest.mark.parametrize("text", ["{", "[1]", '{"a":}'])
def test_bad_json(text: str) -> None:
    with pytest.raises(CommandLineError):
        parse_params(text if text.startswith("{") else "{" + text)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4G", 4 << 30),
        ("512M", 512 << 20),
        ("524288k", 512 << 20),
        ("0x40000000", 1 << 30),
        ("1.5G", 3 << 29),
        ("1073741824", 1 << 30),
        ("1073741824b", 1 << 30),
        ("0x20M", 32 << 20),
        ("0x1b", 27),
        ("2T", 2 << 40),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


def test_sizes_with_another_unit() -> None:
    assert parse_size("512", default_suffix="m") == 512 << 20
    assert parse_size("1G", default_suffix="m") == 1 << 30
    with pytest.raises(CommandLineError):
        parse_size("lots")


@pytest.mark.parametrize(
    ("text", "value"), [("on", True), ("off", False), ("yes", True), ("n", False), ("maybe", None)]
)
def test_booleans(text: str, value: bool | None) -> None:
    assert parse_bool(text) is value
