"""Changes to honest input, for readers that random bytes would never get past the door of."""

import json
import random

VALUES = (
    *(None, True, False, 0, 1, -1, 2, 0.5, -0.0, 1e300, 2**31, 2**62, 10**30, float("nan")),
    *(float("inf"), "", "x", "../x", "/etc/passwd", "\x00", "\ud800", "1", [], {}, [0], [None]),
    *({"a": 1}, [[[[]]]], ["x"] * 3, {"": None}),
)


def mutated(data: bytes, draw: random.Random, *, is_json: bool) -> bytes:
    """`data` with a few changes: of values if it is JSON, else of bytes."""
    if is_json and draw.random() < 0.8:
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            pass
        else:
            for _ in range(draw.choice((1, 1, 1, 2, 4))):
                value = _other_value(value, draw)
            return json.dumps(value).encode()
    for _ in range(draw.choice((1, 1, 2, 8))):
        data = _other_bytes(data, draw)
    return data


def _other_value(value, draw):
    """The same JSON with one value exchanged, removed, renamed or added, somewhere inside."""
    inside = (
        list(value)
        if isinstance(value, dict)
        else range(len(value or ""))
        if isinstance(value, list)
        else ()
    )
    if not inside or draw.random() < 0.1:
        return draw.choice(VALUES)
    key = draw.choice(list(inside))
    other = value.copy()
    kind = draw.random()
    if kind < 0.7:
        other[key] = _other_value(value[key], draw)
    elif kind < 0.8:
        del other[key]
    elif isinstance(value, dict):
        other[draw.choice(("x", "../x", "", str(key) + "_"))] = draw.choice(VALUES)
    else:
        other.insert(key, draw.choice((*VALUES, value[key])))
    return other


def _other_bytes(data, draw):
    """The same bytes with one place changed: a flip, a cut, a number, a repeat."""
    at = (
        draw.randrange(len(data) + 1)
        if draw.random() < 0.5
        else draw.randrange(min(len(data), 4000) + 1)
    )
    match draw.randrange(5):
        case 0:
            return data[:at] + bytes([draw.randrange(256)]) + data[at + 1 :]
        case 1:
            return data[:at]
        case 2:
            number = draw.choice((0, 1, 255, 2**16, 2**31, 2**32 - 1, 2**62, 2**64 - 1, len(data)))
            size = draw.choice((4, 8))
            return data[:at] + (number % 256**size).to_bytes(size, "little") + data[at + size :]
        case 3:
            return data[:at] + data[at + draw.randrange(1, 17) :]
        case _:
            return data[:at] + data[max(0, at - draw.randrange(1, 33)) :]
