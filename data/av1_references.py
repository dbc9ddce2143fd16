"""Which AV1 frames a frame is decoded from, read off the frames' headers, so that no others need to be decoded."""

from collections.abc import Iterator
from itertools import chain

# Headers that are looked at stand in the first bytes of an OBU: two flags, an order hint, eight and 21 bits of slots.
HEADER_BYTES = 64
SEQUENCE_HEADER, FRAME_HEADER, FRAME = 1, 3, 6
KEY_FRAME, INTRA_ONLY_FRAME, SWITCH_FRAME = 0, 2, 3
NUM_SLOTS, NUM_REFERENCES = 8, 7
SELECT = 2
# The configuration record of a container has four bytes before its OBUs (AV1 in ISO base media, 2.3.3).
CONFIGURATION_BYTES = 4


class UnfollowedError(Exception):
    """Something in a stream by which frames may depend on others than those that are followed here."""


class _Bits:
    """Reads numbers off the front of some bytes; nothing after their end but zeros."""

    def __init__(self, content: bytes) -> None:
        self._value = int.from_bytes(content[:HEADER_BYTES].ljust(HEADER_BYTES, b"\0"), "big")
        self._left = 8 * HEADER_BYTES

    def read(self, count: int) -> int:
        self._left -= count
        if self._left < 0:
            raise UnfollowedError("a header is longer than it should be")
        return self._value >> self._left & ((1 << count) - 1)


class Av1References:
    """
    Follows the eight slots in which AV1 keeps frames, packet by packet (AV1 specification 5.9, 7.20).

    A frame takes everything that it does not bring itself, pixels, motion, probabilities, from the slots that its header
    names. Streams with spatial layers, frame numbers, a decoder model or references that are not named one by one are
    not followed.

    Args:
        extradata: What the container says of the stream; its sequence header may also stand in the packets.
    """

    def __init__(self, extradata: bytes | None) -> None:
        self._slots: list[int | None] = [None] * NUM_SLOTS
        self._keys = [False] * NUM_SLOTS
        self._has_sequence = False
        self._has_order_hint, self._order_hint_bits = False, 0
        self._screen_content = self._integer_motion = SELECT
        self._configuration = (extradata or b"")[CONFIGURATION_BYTES:]

    def add(self, position: int, packet: memoryview) -> tuple[int, ...]:
        """
        Takes the next packet.

        Args:
            position: Its number, higher than those before.
            packet: Its content: one temporal unit.

        Returns:
            Positions of the packets whose frames it is decoded from.

        Raises:
            UnfollowedError: Something that is not followed.
        """
        sources: set[int] = set()
        # What the container has of the stream's headers comes first, as if it stood in the first packet.
        configuration, self._configuration = self._configuration, b""
        for kind, content in chain(_obus(memoryview(configuration)), _obus(packet)):
            if kind == SEQUENCE_HEADER:
                self._read_sequence(_Bits(content))
            elif kind in (FRAME_HEADER, FRAME):
                sources.update(self._read_frame(_Bits(content), position))
        return tuple(sorted(sources - {position}))

    def _read_sequence(self, bits: _Bits) -> None:
        """Sequence header (5.5.1), as far as frame headers depend on it."""
        read = bits.read
        read(4)  # profile, still picture
        if read(1):
            raise UnfollowedError("a still picture")
        if read(1):  # timing
            read(64)
            if read(1):
                zeros = 0
                while not read(1):
                    zeros += 1
                read(zeros)
            if read(1):
                raise UnfollowedError("a decoder model")
        has_delay = read(1)
        for _ in range(read(5) + 1):
            read(12)
            if read(5) > 7:  # level, tier
                read(1)
            if has_delay and read(1):
                read(4)
        width_bits, height_bits = read(4) + 1, read(4) + 1
        read(width_bits + height_bits)
        if read(1):
            raise UnfollowedError("frame numbers")
        read(7)  # superblock size, intra and inter tools
        self._has_order_hint = bool(read(1))
        if self._has_order_hint:
            read(2)
        self._screen_content = SELECT if read(1) else read(1)
        self._integer_motion = SELECT
        if self._screen_content > 0:
            self._integer_motion = SELECT if read(1) else read(1)
        self._order_hint_bits = read(3) + 1 if self._has_order_hint else 0
        self._has_sequence = True

    def _read_frame(self, bits: _Bits, position: int) -> list[int]:
        """Frame header (5.9.2) up to the references; returns what is in their slots, and puts the frame into its own."""
        if not self._has_sequence:
            raise UnfollowedError("a frame before any sequence header")
        read = bits.read
        if read(1):  # a frame that was decoded before is shown
            slot = read(3)
            source = self._in_slot(slot)
            if self._keys[slot]:
                self._fill(0xFF, position, True)
            return [source]
        kind, shown = read(2), read(1)
        intra = kind in (KEY_FRAME, INTRA_ONLY_FRAME)
        restart = kind == KEY_FRAME and shown
        if not shown:
            read(1)
        resilient = 1 if kind == SWITCH_FRAME or restart else read(1)
        read(1)
        allows_screen_content = read(1) if self._screen_content == SELECT else self._screen_content
        if allows_screen_content and self._integer_motion == SELECT:
            read(1)
        if kind != SWITCH_FRAME:
            read(1)
        read(self._order_hint_bits)
        if not intra and not resilient:
            read(3)
        filled = 0xFF if kind == SWITCH_FRAME or restart else read(8)
        sources: list[int] = []
        if (not intra or filled != 0xFF) and resilient and self._has_order_hint:
            raise UnfollowedError("order hints of the slots")
        if not intra:
            if self._has_order_hint and read(1):
                raise UnfollowedError("references by order hint")
            sources = [self._in_slot(read(3)) for _ in range(NUM_REFERENCES)]
        self._fill(filled, position, kind == KEY_FRAME)
        return sources

    def _in_slot(self, slot: int) -> int:
        source = self._slots[slot]
        if source is None:
            raise UnfollowedError("a reference to a frame before the start")
        return source

    def _fill(self, slots: int, position: int, key: bool) -> None:
        for slot in range(NUM_SLOTS):
            if slots >> slot & 1:
                self._slots[slot], self._keys[slot] = position, key


def _obus(packet: memoryview) -> Iterator[tuple[int, bytes]]:
    """Kind and first bytes of each OBU (5.3)."""
    start = 0
    while start < len(packet):
        head = packet[start]
        start += 1
        if head & 0x04:
            if packet[start : start + 1].tobytes()[:1] not in _ONE_SPATIAL_LAYER:
                raise UnfollowedError("spatial layers")
            start += 1
        size = len(packet) - start
        if head & 0x02:
            size, start = _leb128(packet, start)
        if start + size > len(packet):
            raise UnfollowedError("an OBU that is cut off")
        yield head >> 3 & 0x0F, bytes(packet[start : start + min(size, HEADER_BYTES)])
        start += size


# Extension byte: temporal layer, spatial layer 0.
_ONE_SPATIAL_LAYER = frozenset(bytes([temporal << 5]) for temporal in range(8))


def _leb128(packet: memoryview, start: int) -> tuple[int, int]:
    """A number of up to eight bytes, and where it ends."""
    value = 0
    for place in range(8):
        if start + place >= len(packet):
            break
        byte = packet[start + place]
        value |= (byte & 0x7F) << 7 * place
        if not byte & 0x80:
            return value, start + place + 1
    raise UnfollowedError("a size without end")


__all__ = ["Av1References", "UnfollowedError"]
