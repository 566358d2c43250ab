"""What the pure half of the NBD server says to each request and option, case by case."""

from __future__ import annotations

import errno

import pytest

from clustermd.errors import BadBytes
from clustermd.export import nbd_handshake as handshake
from clustermd.export import nbd_protocol as protocol
from clustermd.export.nbd_handshake import Handshake, Info, Option, Phase, Reply
from clustermd.export.nbd_protocol import Command, CommandFlag, Export, NbdError, RequestParser

MIB = 1 << 20
SIZE = 64 * MIB
EXPORT = Export("md0", SIZE, read_only=False)
READ_ONLY = Export("md0", SIZE, read_only=True)


def request(
    command: int, offset: int = 0, length: int = 0, flags: int = 0, cookie: int = 7, payload: bytes = b""
) -> bytes:
    return protocol.REQUEST.pack(protocol.REQUEST_MAGIC, flags, command, cookie, offset, length) + payload


def parse(stream: bytes, export: Export = EXPORT, structured: bool = False) -> list[protocol.Parsed]:
    parsed, _, _ = RequestParser(export, structured).parse(stream, 0, len(stream), 1000, 1 << 40)
    return parsed


def verdict(command: int, offset: int, length: int, flags: int = 0, export: Export = EXPORT) -> int:
    (parsed,) = parse(request(command, offset, length, flags, payload=bytes(min(length, 70000))), export)
    return parsed[-1]


@pytest.mark.parametrize(
    ("command", "offset", "length", "flags", "expected"),
    [
        (Command.READ, 0, 4096, 0, 0),
        (Command.READ, SIZE - 512, 512, 0, 0),
        (Command.READ, SIZE - 512, 1024, 0, NbdError.EINVAL),
        (Command.READ, SIZE, 512, 0, NbdError.EINVAL),
        (Command.READ, 2**64 - 512, 1024, 0, NbdError.EINVAL),
        (Command.READ, 0, 32 * MIB, 0, 0),
        (Command.READ, 0, 32 * MIB + 512, 0, NbdError.EINVAL),
        (Command.READ, 1, 512, 0, NbdError.EINVAL),
        (Command.READ, 0, 511, 0, NbdError.EINVAL),
        (Command.READ, 0, 0, 0, 0),
        (Command.READ, 0, 512, CommandFlag.FUA, 0),
        (Command.READ, 0, 512, CommandFlag.DF, NbdError.EINVAL),
        (Command.READ, 0, 512, CommandFlag.NO_HOLE, NbdError.EINVAL),
        (Command.WRITE, 0, 4096, 0, 0),
        (Command.WRITE, 0, 4096, CommandFlag.FUA, 0),
        (Command.WRITE, SIZE - 512, 1024, 0, NbdError.ENOSPC),
        (Command.WRITE, 256, 512, 0, NbdError.EINVAL),
        (Command.WRITE, 0, 32 * MIB + 512, 0, NbdError.EINVAL),
        (Command.FLUSH, 0, 0, 0, 0),
        (Command.FLUSH, 0, 512, 0, NbdError.EINVAL),
        (Command.TRIM, 0, SIZE, CommandFlag.FUA, 0),
        (Command.TRIM, SIZE, 512, 0, NbdError.EINVAL),
        (Command.TRIM, 0, 100, 0, NbdError.EINVAL),
        (Command.WRITE_ZEROES, 0, SIZE, CommandFlag.NO_HOLE | CommandFlag.FUA, 0),
        (Command.WRITE_ZEROES, 512, SIZE, 0, NbdError.ENOSPC),
        (Command.WRITE_ZEROES, 0, 512, CommandFlag.FAST_ZERO, NbdError.ENOTSUP),
        (Command.DISC, 0, 0, 0, 0),
        (5, 0, 512, 0, NbdError.EINVAL),
        (7, 0, 512, 0, NbdError.EINVAL),
        (65535, 0, 512, 0, NbdError.EINVAL),
    ],
)
def test_each_request_is_granted_or_refused_with_the_protocols_error(
    command: int, offset: int, length: int, flags: int, expected: int
) -> None:
    assert verdict(command, offset, length, flags) == expected


@pytest.mark.parametrize("command", [Command.WRITE, Command.TRIM, Command.WRITE_ZEROES])
def test_a_read_only_export_permits_no_change(command: Command) -> None:
    assert verdict(command, 0, 512, export=READ_ONLY) == NbdError.EPERM
    assert verdict(Command.READ, 0, 512, export=READ_ONLY) == 0


def test_df_is_granted_where_structured_replies_were_agreed_on() -> None:
    (parsed,) = parse(request(Command.READ, 0, 512, CommandFlag.DF), structured=True)
    assert parsed[-1] == 0


def test_flags_of_an_export() -> None:
    flag = protocol.TransmissionFlag
    always = flag.HAS_FLAGS | flag.SEND_FLUSH | flag.SEND_FUA | flag.CAN_MULTI_CONN
    assert EXPORT.flags(False) == always | flag.SEND_TRIM | flag.SEND_WRITE_ZEROES
    assert EXPORT.flags(True) == EXPORT.flags(False) | flag.SEND_DF
    assert READ_ONLY.flags(False) == always | flag.READ_ONLY


def test_a_batch_ends_with_disc() -> None:
    stream = request(Command.READ, 0, 512) + request(Command.DISC) + request(Command.READ, 0, 512)
    assert [parsed[0] for parsed in parse(stream)] == [Command.READ, Command.DISC]


def test_an_incomplete_small_write_waits_and_a_long_one_is_handed_out() -> None:
    small = request(Command.WRITE, 0, protocol.DIRECT_BYTES, payload=bytes(protocol.DIRECT_BYTES - 1))
    parser = RequestParser(EXPORT, False)
    assert parser.parse(small, 0, len(small), 10, SIZE) == ([], 0, False)
    long = request(Command.WRITE, 0, protocol.DIRECT_BYTES + 512, payload=b"abc")
    (parsed,), following, full = parser.parse(long, 0, len(long), 10, SIZE)
    assert parsed[5] == 28 and following == 28 + protocol.DIRECT_BYTES + 512 and not full


def test_a_lost_stream_is_told_only_after_what_precedes_it() -> None:
    good = request(Command.READ, 0, 512)
    for bad in (b"\0" * 28, request(Command.WRITE, 0, protocol.MAXIMUM_SKIP_BYTES + 1)):
        stream = good + bad
        parser = RequestParser(EXPORT, False)
        parsed, following, _ = parser.parse(stream, 0, len(stream), 10, SIZE)
        assert len(parsed) == 1 and following == len(good)
        with pytest.raises(BadBytes):
            parser.parse(stream, following, len(stream), 10, SIZE)


def test_room_bounds_a_batch_and_refused_requests_need_none() -> None:
    stream = b"".join(request(Command.READ, 0, length) for length in (4096, 33 * MIB, 4096, 4096))
    parser = RequestParser(EXPORT, False)
    parsed, following, full = parser.parse(stream, 0, len(stream), 100, 8192)
    assert [one[-1] for one in parsed] == [0, NbdError.EINVAL, 0] and following == 84 and full
    parsed, following, full = parser.parse(stream, 0, len(stream), 2, SIZE)
    assert len(parsed) == 2 and full


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.EIO, NbdError.EIO),
        (errno.EROFS, NbdError.EPERM),
        (errno.EDQUOT, NbdError.ENOSPC),
        (errno.ESHUTDOWN, NbdError.ESHUTDOWN),
        (errno.EOPNOTSUPP, NbdError.ENOTSUP),
        (errno.EBADF, NbdError.EIO),
        (9999, NbdError.EIO),
    ],
)
def test_errors_are_said_in_the_wires_numbers(number: int, expected: int) -> None:
    assert protocol.nbd_error(number) == expected


# Negotiation


def option(number: int, data: bytes = b"", length: int | None = None) -> bytes:
    return (
        handshake.OPTION.pack(handshake.OPTION_MAGIC, number, len(data) if length is None else length) + data
    )


def go_data(name: bytes, *infos: int) -> bytes:
    asked = b"".join(info.to_bytes(2, "big") for info in infos)
    return len(name).to_bytes(4, "big") + name + len(infos).to_bytes(2, "big") + asked


def negotiate(*words: bytes, client_flags: int = 3, export: Export = EXPORT) -> tuple[Handshake, bytes]:
    state = Handshake(export, "a description")
    stream = client_flags.to_bytes(4, "big") + b"".join(words)
    said = b""
    at = 0
    while not state.over:
        following, reply = state.feed(stream, at, len(stream))
        said += reply
        if following == at:
            break
        at = following
    return state, said


def replies(said: bytes) -> list[tuple[int, int, bytes]]:
    """(option, reply, data) of each."""
    found = []
    while said:
        magic, number, kind, length = handshake.OPTION_REPLY.unpack_from(said)
        assert magic == handshake.OPTION_REPLY_MAGIC
        found.append((number, kind, said[20 : 20 + length]))
        said = said[20 + length :]
    return found


@pytest.mark.parametrize("name", [b"", b"md0"])
@pytest.mark.parametrize("number", [Option.GO, Option.INFO])
def test_go_and_info_tell_of_the_export_by_either_name(name: bytes, number: Option) -> None:
    asked = go_data(name, Info.NAME, Info.DESCRIPTION, Info.BLOCK_SIZE, 999)
    state, said = negotiate(option(number, asked))
    infos = {data[:2]: data[2:] for _, kind, data in replies(said) if kind == Reply.INFO}
    assert infos[b"\0\0"] == SIZE.to_bytes(8, "big") + EXPORT.flags(False).to_bytes(2, "big")
    assert infos[b"\0\3"] == b"\0\0\2\0" + b"\0\0\x10\0" + b"\2\0\0\0"
    assert infos[b"\0\1"] == b"md0" and infos[b"\0\2"] == b"a description"
    assert replies(said)[-1] == (number, Reply.ACK, b"")
    assert state.phase is (Phase.TRANSMISSION if number is Option.GO else Phase.OPTIONS)


def test_clients_hear_what_the_disks_can_read_and_write() -> None:
    export = Export("md0", SIZE, read_only=False, block_bytes=4096)
    _, said = negotiate(option(Option.INFO, go_data(b"", Info.BLOCK_SIZE)), export=export)
    infos = {data[:2]: data[2:] for _, kind, data in replies(said) if kind == Reply.INFO}
    assert infos[b"\0\3"][:4] == (4096).to_bytes(4, "big")


@pytest.mark.parametrize("number", [Option.GO, Option.INFO])
def test_an_unknown_export_is_named_and_the_client_may_go_on(number: Option) -> None:
    state, said = negotiate(option(number, go_data(b"md9")), option(Option.GO, go_data(b"md0")))
    assert replies(said)[0][:2] == (number, Reply.ERR_UNKNOWN)
    assert b"md0" in replies(said)[0][2]
    assert state.phase is Phase.TRANSMISSION


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0",
        go_data(b"md0", Info.NAME)[:-1],
        go_data(b"md0") + b"x",
        b"\xff\xff\xff\xff" + b"md0\0\0",
        go_data(b"x" * 5000),
    ],
)
def test_a_malformed_go_is_invalid_and_opens_nothing(data: bytes) -> None:
    state, said = negotiate(option(Option.GO, data))
    assert replies(said)[0][:2] == (Option.GO, Reply.ERR_INVALID)
    assert state.phase is Phase.OPTIONS


def test_list_names_the_array() -> None:
    _, said = negotiate(option(Option.LIST), option(Option.LIST, b"x"))
    assert replies(said) == [
        (Option.LIST, Reply.SERVER, b"\0\0\0\3md0"),
        (Option.LIST, Reply.ACK, b""),
        (Option.LIST, Reply.ERR_INVALID, b"LIST takes no data"),
    ]


def test_structured_replies_are_agreed_on_and_shown_in_the_flags() -> None:
    state, said = negotiate(option(Option.STRUCTURED_REPLY), option(Option.GO, go_data(b"")))
    assert replies(said)[0] == (Option.STRUCTURED_REPLY, Reply.ACK, b"")
    assert replies(said)[1][2] == b"\0\0" + SIZE.to_bytes(8, "big") + EXPORT.flags(True).to_bytes(2, "big")
    assert state.structured
    refused, said = negotiate(option(Option.STRUCTURED_REPLY, b"x"))
    assert replies(said)[0][1] == Reply.ERR_INVALID and not refused.structured


@pytest.mark.parametrize("number", [5, 9, 10, 11, 4, 12345])
def test_other_options_are_unsupported(number: int) -> None:
    state, said = negotiate(option(number, b"whatever"))
    assert replies(said)[0][:2] == (number, Reply.ERR_UNSUP)
    assert state.phase is Phase.OPTIONS


def test_abort_is_acknowledged() -> None:
    state, said = negotiate(option(Option.ABORT))
    assert replies(said) == [(Option.ABORT, Reply.ACK, b"")]
    assert state.phase is Phase.ENDED


@pytest.mark.parametrize(("client_flags", "zeroes"), [(3, 0), (1, 124), (0, 124)])
def test_export_name_answers_with_zeroes_unless_they_were_waived(client_flags: int, zeroes: int) -> None:
    state, said = negotiate(option(Option.EXPORT_NAME, b"md0"), client_flags=client_flags)
    assert said == SIZE.to_bytes(8, "big") + EXPORT.flags(False).to_bytes(2, "big") + bytes(zeroes)
    assert state.phase is Phase.TRANSMISSION


def test_an_option_that_is_too_long_is_skipped() -> None:
    long = handshake.MAXIMUM_OPTION_BYTES + 1
    state, said = negotiate(option(Option.GO, bytes(long)), option(Option.LIST))
    assert [reply[1] for reply in replies(said)] == [Reply.ERR_TOO_BIG, Reply.SERVER, Reply.ACK]
    assert state.phase is Phase.OPTIONS


@pytest.mark.parametrize(
    ("code", "client_flags", "words"),
    [
        ("nbd-client-flags", 4, b""),
        ("nbd-option-magic", 3, bytes(16)),
        ("nbd-option-length", 3, option(Option.GO, length=handshake.MAXIMUM_SKIP_BYTES + 1)),
        ("nbd-export-name", 3, option(Option.EXPORT_NAME, b"md9")),
        ("nbd-export-name", 3, option(Option.EXPORT_NAME, length=5000)),
        ("nbd-old-client", 2, option(Option.GO, go_data(b""))),
        ("nbd-options", 3, option(12345) * (handshake.MAXIMUM_OPTIONS + 1)),
    ],
)
def test_what_makes_no_sense_raises_and_changes_nothing(code: str, client_flags: int, words: bytes) -> None:
    state = Handshake(EXPORT, "")
    stream = client_flags.to_bytes(4, "big") + words
    at = 0
    phase = state.phase

    def feed_all() -> None:
        nonlocal at, phase
        for _ in range(1000):
            phase = state.phase
            at, _ = state.feed(stream, at, len(stream))

    with pytest.raises(BadBytes) as caught:
        feed_all()
    assert caught.value.code == code
    assert state.phase is phase and not state.over
