"""A reader of caches written from docs/format.md alone. It imports nothing of decant.

zarr3 arrays are opened by TensorStore as any zarr3 array: the page says no more of them either.
"""

import hashlib
import json
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import tensorstore
import zstandard

SEVEN = (0, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 7 / 8, 1)


# Conventions


def digest(value):
    """Sha256 of the canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def read_json(path):
    value = json.loads(path.read_text("utf-8"))
    assert digest({k: v for k, v in value.items() if k != "checksum"}) == value["checksum"]
    return value


def bitmap(data, count):
    return np.unpackbits(np.frombuffer(data, np.uint8), count=count).astype(bool)


def varint(data, at):
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return value, at


# ArrayRecord files


def array_records(path):
    """All records of a file."""
    file = path.read_bytes()

    def chunk(begin):
        """The records of the chunk at `begin`."""
        last = (begin // 65536 + 1) * 65536
        data = file[begin:last] if begin % 65536 else b""
        for block in range(last if begin % 65536 else begin, len(file), 65536):
            data += file[block + 24 : block + 65536]
        _, length, _, kind, total = struct.unpack_from("<5Q", data)
        assert kind & 255 == ord("r")
        data = data[40 : 40 + length]
        assert data[0] == 0
        bytes_of_sizes, at = varint(data, 1)
        records, begins = [], at + bytes_of_sizes
        for _ in range(kind >> 8):
            size, at = varint(data, at)
            records.append(data[begins : begins + size])
            begins += size
        assert sum(map(len, records)) == total
        return records

    def offset(record):
        assert record[0] == 8
        return varint(record, 1)[0]

    postscript, *_ = chunk(len(file) - 65536)
    _, *entries = chunk(offset(postscript))
    return [record for entry in entries for record in chunk(offset(entry))]


# Records


def record(data, kind):
    """(row key, S, {field: (codec, payload)}); fields that come again are (field, 1), …"""
    magic, version, of_kind, count, crc = struct.unpack_from("<4sBBHI", data)
    assert (magic, version, of_kind) == (b"DCNT", 1, kind)
    assert zlib.crc32(data[12:], zlib.crc32(data[:8])) == crc
    key, length = struct.unpack_from("<16sI", data, 12)
    at, blocks = 32 + 6 * count, {}
    for i in range(count):
        field, codec, size = struct.unpack_from("<BBI", data, 32 + 6 * i)
        again = sum((name[0] if isinstance(name, tuple) else name) == field for name in blocks)
        blocks[(field, again) if again else field] = codec, data[at : at + size]
        at += size
    assert at == len(data)
    return key, length, blocks


def row(data):
    key, length, blocks = record(data, 1)
    codec, payload = blocks[1]
    tokens = np.frombuffer(zstandard.decompress(payload), {1: "<u2", 2: "<u4"}[codec])
    out = {"tokens": tokens.astype(np.int32), "loss_mask": bitmap(blocks[3][1], length)}
    lengths = np.frombuffer(blocks[2][1], "<u4")
    padding = length - lengths.sum()
    segments = [*np.repeat(np.arange(1, len(lengths) + 1), lengths), *[0] * padding]
    positions = [i for n in lengths for i in range(n)]
    out["segment_ids"] = np.array(segments, np.int32)
    out["positions"] = np.array([*positions, *[0] * padding], np.int32)
    hashed = out["tokens"].tobytes() + out["segment_ids"].tobytes() + blocks[3][1]
    if 5 in blocks:
        codec, payload = blocks[5]
        assert codec == 3
        planes = np.frombuffer(zstandard.decompress(payload), np.uint8).reshape(4, -1)
        out["writer_logprobs"] = np.full(length, np.nan, np.float32)
        out["writer_logprobs"][out["loss_mask"]] = planes.T.copy().view("<f4")[:, 0]
        hashed += planes.T.tobytes()
    assert hashlib.sha256(hashed).digest()[:16] == key
    return key, out, np.frombuffer(blocks[4][1], "<i8").reshape(-1, 3)


# Building blocks of payloads


def sections(payload, at=0):
    """The sections from byte `at` on; their number follows from their lengths."""
    lengths = []
    while at + sum(lengths) < len(payload):
        length, at = varint(payload, at)
        lengths.append(length)
    ends = at + np.cumsum(lengths)
    assert ends[-1] == len(payload)
    return [payload[e - n : e] for n, e in zip(lengths, ends, strict=True)]


def stream(section, *shape):
    """An array of bytes."""
    size = int(np.prod(shape))
    if len(section) != size:
        head = b"\x28\xb5\x2f\xfd\xa0" + struct.pack("<I", size)
        section = zstandard.decompress(head + section)
    return np.frombuffer(section, np.uint8).reshape(shape)


def unescape(codes, escapes, dtype="<u2"):
    numbers = codes.astype(np.int64)
    numbers[codes == 255] = np.frombuffer(escapes, dtype)
    return numbers


def runs(k, most):
    """Rows of each run."""
    r = min(k, most)
    return [k * (i + 1) // r - k * i // r for i in range(r)]


def numbers(symbols, raw, low=0):
    bits = np.unpackbits(np.frombuffer(raw, np.uint8), bitorder="little").tolist()
    out, at = [], 0
    low = np.broadcast_to(low, symbols.shape).reshape(-1).tolist()
    for s, more in zip(symbols.reshape(-1).tolist(), low, strict=True):
        width = (s // 4 - 1 if s >= 4 else 0) + more
        of_number = sum(bit << i for i, bit in enumerate(bits[at : at + width]))
        out.append(((s if s < 4 else 4 + s % 4) << width) + of_number)
        at += width
    return np.array(out, np.int64).reshape(symbols.shape)


def unfold(folded):
    return np.where(folded % 2, -(folded + 1) // 2, folded // 2)


def byte_planes(payload, width, n):
    planes = [stream(part, width, n).astype(np.uint32) for part in sections(payload)]
    bits = sum(plane << 8 * i for i, plane in enumerate(planes))
    return np.ascontiguousarray(bits.T).view(np.float32)


def permutation(table, vocabulary):
    return np.concatenate([table, np.setdiff1d(np.arange(vocabulary), table)])


def level_values(steps):
    cost, limit = steps
    ratio = min(cost / limit, 0.5)
    knee = -np.log((1 - np.sqrt(1 - 4 * ratio**2)) / 2)
    x = np.arange(int(np.ceil(2048 * knee)) + 2) / 2048
    p = np.exp(-x)
    f = np.maximum(1 / limit, np.sqrt(p * (1 - p)) / cost)
    integral = np.concatenate([[0], np.cumsum((f[:-1] + f[1:]) / 2 / 2048)])
    base = np.interp(knee, x, integral)
    level = np.arange(4095)
    near = np.interp(level, integral, x)
    values = np.where(level <= base, near, knee + (level - base) * limit)
    return np.append(-values, -np.inf).astype(np.float32)


# The top-k: ids and log-probabilities or levels, [n, k]


def lossless(parts, k, n, vocabulary):
    width = id_bytes(vocabulary)
    planes = [stream(part, k, n).astype(np.uint32) for part in parts]
    ids = sum(plane << 8 * i for i, plane in enumerate(planes[:width]))
    bits = sum(plane << 8 * i for i, plane in enumerate(planes[width:]))
    return ids.T, np.ascontiguousarray(bits.T).view(np.float32)


def id_bytes(vocabulary):
    return max(1, (int(vocabulary - 1).bit_length() + 7) // 8)


def fast(payload, k, n, tables, vocabulary):
    escapes, first, others, *planes = sections(payload)
    head = min(4, k)
    codes = np.concatenate([stream(first, head, n), stream(others, k - head, n)])
    levels = unescape(codes, escapes).cumsum(0)
    ranks = sum(stream(plane, k, n).astype(int) << 8 * i for i, plane in enumerate(planes))
    return permutation(tables["order"], vocabulary)[ranks].T, levels.T


def compact(payload, k, n, tables, vocabulary):
    groups = payload[0]
    parts = iter(sections(payload, 1))
    order, group, last = (stream(next(parts), n) for _ in range(3))
    last = unescape(last, next(parts))
    relative_escapes, raw = next(parts), next(parts)
    codes = np.concatenate([stream(next(parts), rows, n) for rows in runs(k, 4)])
    levels = last - unescape(codes, relative_escapes)
    symbols = np.concatenate(
        [
            np.concatenate([stream(next(parts), rows, int(size)) for rows in runs(k, 8)])
            for size in np.bincount(group, minlength=groups)
        ],
        axis=1,
    )
    places = numbers(symbols, raw)
    places[1:] += 1
    places = places.cumsum(0)
    by_rank = permutation(tables["order"], vocabulary)
    orders = tables["orders"].astype(int)
    depth = orders.shape[1]
    listed = orders[order, np.minimum(places, depth - 1)]
    ids = by_rank[np.where(places < depth, listed, places - depth)]
    out_ids, out_levels = np.empty((2, n, k), np.int64)
    at = np.argsort(group, kind="stable")
    out_ids[at], out_levels[at] = ids.T, levels.T
    by_level = np.lexsort((out_ids, out_levels))
    return np.take_along_axis(out_ids, by_level, 1), np.take_along_axis(out_levels, by_level, 1)


# The tail: A at the nodes, [n, nodes]


def exact_tail(payload, codec, k, n, vocabulary):
    nodes = {1: 7, 3: 9}[codec]
    planes = stream(payload, nodes - 1, 4, n).astype(np.uint32)
    bits = sum(planes[:, byte] << 8 * byte for byte in range(4))
    return with_size(np.ascontiguousarray(bits.T).view(np.float32), k, vocabulary)


def with_size(above, k, vocabulary):
    size = np.log(vocabulary - k) if vocabulary > k else -np.inf
    return np.concatenate([np.full((len(above), 1), size, np.float32), above], axis=1)


def quantised_tail(payload, last, k, n, tables, vocabulary):
    if k == vocabulary:
        return np.full((n, 7), -np.inf, np.float32)
    escapes, *streams = sections(payload)
    codes = unescape(np.stack([stream(part, n) for part in streams]), escapes, "<u4")
    residuals = unfold(codes)
    q = [np.full(n, 32), np.full(n, np.rint(32 * np.log(max(vocabulary - k, 1)))), last]
    for coefficients, residual in zip(tables["tail"], residuals, strict=True):
        predicted = sum(c / 4096 * p for c, p in zip(coefficients, q, strict=False))
        q.append(residual + np.floor(predicted + 0.5))
    levels = np.stack(q[3:], axis=1)
    above = np.where(levels == -32768, -np.inf, levels / 32).astype(np.float32)
    return with_size(above, k, vocabulary)


# Draws


def draws(codec, payload, last_value, n, tables, vocabulary):
    m, mask = struct.unpack_from("<HB", payload)
    nodes = [beta for i, beta in enumerate(SEVEN) if mask >> i & 1]
    if codec == 1:
        return nodes, *lossless(sections(payload, 3), m, n, vocabulary)
    raw, escapes, *parts = sections(payload, 3)
    parts = iter(parts)
    of_levels = runs(m, max(1, min(2, m * n // 2048)))
    of_symbols = runs(m, max(1, min(8, m * n // 2048)))
    levels = np.concatenate([stream(next(parts), rows, n) for rows in of_levels])
    levels = unescape(levels, escapes).T
    symbols = np.concatenate([stream(next(parts), rows, n) for rows in of_symbols])
    ids = permutation(tables["draw-order"], vocabulary)[numbers(symbols, raw).cumsum(0)].T
    base = np.where(np.isfinite(last_value), last_value, 0)[:, None] + 1
    return nodes, ids, np.where(levels == 65535, -np.inf, base - levels / 8)


def logweights(logprobs, tail, draw_nodes, nodes):
    shares = sum(np.exp(beta * logprobs - tail[:, nodes.index(beta), None]) for beta in draw_nodes)
    weights = np.log(len(draw_nodes) / logprobs.shape[1]) - np.log(shares)
    return np.where(np.isfinite(logprobs), weights, -np.inf)


def targets(data, key, tables, vocabulary, signal):
    """The bitmap `scored`, and the targets of the scored positions."""
    own_key, length, blocks = record(data, 2)
    assert own_key == key
    scored, nodes = bitmap(blocks[16][1], length), signal["betas"]
    n, (codec, payload) = int(scored.sum()), blocks[17]
    if not n:
        return scored, {}
    if codec == 2:
        return scored, adaptive(blocks, payload, n, tables, vocabulary, signal)
    return scored, decode(blocks, *struct.unpack("<I", payload), n, tables, vocabulary, nodes)


def adaptive(blocks, payload, n, tables, vocabulary, signal):
    """The targets of n positions that hold different numbers of ids."""
    k, nodes = signal["k"], signal["betas"]
    sizes = np.frombuffer(payload, "<u4", payload[0], 1).tolist()
    number = stream(payload[1 + 4 * len(sizes) :], n)
    out = {
        "topk_ids": np.zeros((n, k), np.int32),
        "topk_logprobs": np.full((n, k), -np.inf),
        "tail_logmass": np.empty((n, len(nodes))),
    }
    for i, size in enumerate(sizes):
        own = {field: blocks[(field, i) if i else field] for field in (1, 2)}
        here = number == i
        of_size = decode(own, size, int(here.sum()), tables, vocabulary, nodes)
        out["tail_logmass"][here] = of_size["tail_logmass"]
        for name in ("topk_ids", "topk_logprobs"):
            out[name][here, :size] = of_size[name]
    return out | ({"label_logprobs": labels(*blocks[4], n)} if 4 in blocks else {})


def decode(blocks, k, n, tables, vocabulary, nodes):
    """The targets of n positions in the fields 1, 2 and 3."""
    of_labels = {"label_logprobs": labels(*blocks[4], n)} if 4 in blocks else {}
    if not k:
        return of_labels
    (codec, payload), (tail_codec, tail) = blocks[1], blocks[2]
    if codec == 1:
        ids, logprobs = lossless(sections(payload), k, n, vocabulary)
        tail = exact_tail(tail, tail_codec, k, n, vocabulary)
        shift, last_value = np.zeros((n, 1)), None
    else:
        of_codec = {2: fast, 3: compact}[codec]
        ids, levels = of_codec(payload, k, n, tables, vocabulary)
        values = level_values(tables["steps"])
        logprobs, last_value = values[levels], values[levels[:, -1]]
        tail = quantised_tail(tail, levels[:, -1], k, n, tables, vocabulary)
        shift = np.log(np.exp(logprobs).sum(1) + np.exp(tail[:, -1]))[:, None]
    out = {"topk_ids": ids, "topk_logprobs": logprobs - shift}
    out["tail_logmass"] = tail - np.array(nodes) * shift
    if 3 in blocks:
        of_draws = draws(*blocks[3], last_value, n, tables, vocabulary)
        out["tail_ids"], out["tail_logprobs"] = of_draws[1], of_draws[2] - shift
        out["tail_logweights"] = logweights(
            out["tail_logprobs"], out["tail_logmass"], of_draws[0], nodes
        )
    return out | of_labels


# Labels, counts and sketches


def labels(codec, payload, n):
    if codec == 1:
        return byte_planes(payload, 1, n)[:, 0]
    raw, symbols = sections(payload)
    levels = numbers(stream(symbols, n), raw)
    return np.where(levels == (1 << 24) - 1, -np.inf, levels / -32).astype(np.float32)


KINDS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768)


def kind(number):
    return sum(number >= least for least in KINDS)


def counts(payload, n, draws, head_ids, head_logprobs, tables, vocabulary):
    """[{id: count}] of the positions."""
    k = head_ids.shape[1]
    parts = iter(sections(payload, 1))
    flags, symbols, raw = (next(parts) for _ in range(3))
    of_head = [next(parts) for _ in range(5)] if k else None
    codes, escapes, order, gap_bits = (next(parts) for _ in range(4))
    sizes = unescape(stream(codes, n), escapes)
    order, total = stream(order, n), int(sizes.sum())
    frames = runs(total, payload[0]) if total else [0]
    gap_symbols = np.concatenate([stream(next(parts), size) for size in frames])
    entries = [(position, i) for position, size in enumerate(sizes) for i in range(size)]
    contexts = [tables["contexts"][20 * kind(sizes[p]) + kind(i)] for p, i in entries]
    stored = np.argsort(contexts, kind="stable").astype(int)
    gaps = dict(zip(stored.tolist(), numbers(gap_symbols, gap_bits).tolist(), strict=True))
    in_head = head_logprobs > -np.inf
    alone = ~in_head.any(1)
    flagged = [e for e in stored.tolist() if entries[e][1] or not alone[entries[e][0]]]
    several = bitmap(
        stream(flags, (len(flagged) + 7) // 8).tobytes() if flagged else b"", len(flagged)
    )
    more = numbers(stream(symbols, int(several.sum())), raw).tolist()
    of_entry = {e: 2 + more.pop(0) if f else 1 for e, f in zip(flagged, several, strict=True)}
    by_rank = permutation(tables["order"], vocabulary)
    depth, place, out = tables["orders"].shape[1], 0, [{} for _ in range(n)]
    rest = {}
    for entry, (position, i) in enumerate(entries):
        place = gaps[entry] + (place + 1 if i else 0)
        rank = tables["orders"][order[position], place] if place < depth else place - depth
        out[position][int(by_rank[rank])] = of_entry.get(entry, 0)
        if entry not in of_entry:
            rest[position] = int(by_rank[rank])
    if k:
        rest |= {p: int(head_ids[p, 0]) for p in np.flatnonzero(~alone).tolist()}
        for (position, slot), count in counts_of_head(of_head, in_head, head_logprobs, draws):
            if count:
                out[position][int(head_ids[position, slot])] = count
    for position, of_id in rest.items():
        out[position][of_id] = draws - sum(c for v, c in out[position].items() if v != of_id)
    return [{v: c for v, c in sorted(of.items()) if c} for of in out]


def counts_of_head(parts, in_head, logprobs, draws):
    """((position, slot), count) of all ids in the head but each position's first."""
    doubtful, missed, beyond, symbols, raw = parts
    at = [(p, slot) for p, slot in np.argwhere(in_head).tolist() if slot]
    exact = 32 * draws * np.exp([float(logprobs[place]) for place in at])
    q = np.floor(exact).astype(np.int64)
    for d in np.frombuffer(doubtful, "<u4").tolist():
        if q[d // 2] % 2 != d % 2:
            q[d // 2] += -1 if exact[d // 2] - q[d // 2] < 0.5 else 1
    f = q % 32
    order = np.argsort(np.minimum(f, 31 - f) + 16 * (q >= 32), kind="stable")
    nearest = q // 32 + (f >= 16)
    other = nearest + np.where(f < 16, 1, -1)
    missed = order[bitmap(stream(missed, (len(at) + 7) // 8).tobytes(), len(at))]
    beyond = missed[bitmap(stream(beyond, (len(missed) + 7) // 8).tobytes(), len(missed))]
    count = nearest.copy()
    count[missed] = other[missed]
    count[beyond] = nearest[beyond] + unfold(numbers(stream(symbols, len(beyond)), raw))
    return zip(at, count.tolist(), strict=True)


def sketch(codec, payload, n, signal, deviations, key):
    r, step = signal["rank"], signal["step"]
    if codec == 1:
        return byte_planes(payload, r, n)
    m, left = n, np.arange(n)
    if codec in (3, 5, 7):
        key, m = payload[:16], int.from_bytes(payload[16:20], "little")
        end = 20 + -(-m // 8)
        left = np.flatnonzero(np.unpackbits(np.frombuffer(payload[20:end], np.uint8))[:m])
        payload = payload[end:]
    delta = max(step * deviations[min(r, 128) - 1], 2.0**-16 * deviations.max()) or 1.0
    s = deviations / delta
    if codec in (6, 7):
        (first,) = struct.unpack("<H", hashlib.shake_256(b"decant sketch dither 3" + key).digest(2))
        d = (first + 40503 * left) % 2**16
        return delta * (dithered_levels(payload, n, s, d).T - ((d + 0.5) / 2**16 - 0.5)[:, None])
    if codec in (4, 5):
        first = hashlib.shake_256(b"decant sketch dither 2" + key).digest(2 * r)
        d = (np.frombuffer(first, "<u2").astype(int)[:, None] + 40503 * left) % 2**16
        return (delta * (column_dithered_levels(payload, n, s, d) - ((d + 0.5) / 2**16 - 0.5))).T
    levels = undithered_levels(payload, n, s)
    dither = np.zeros((r, n))
    if signal["dither"]:
        u = hashlib.shake_256(b"decant sketch dither 1" + key).digest(r * m)
        dither = (np.frombuffer(u, np.uint8).reshape(r, m)[:, left] + 0.5) / 256 - 0.5
    return (delta * (levels - dither)).T


def dithered_levels(payload, n, s, d):
    first, count, raw, distances, excesses, *frames = sections(payload)
    levels = np.zeros((len(s), n), np.int64)
    levels[s >= 1.1] = undithered_levels(first, n, s[s >= 1.1])
    columns = np.argsort(-s, kind="stable")[(s >= 1.1).sum() :]
    way = np.minimum(d, 2**16 - 1 - d)
    positions = np.argsort(way, kind="stable")
    cells, folded = [[[], []], [[], []], [[], []]], np.zeros((n, len(columns)), np.int64)
    for group in range(6):
        below, least = s[columns] < 1.1 / 2**group, s[columns] >= 1.1 / 2 ** (group + 1)
        mine = below & (least | (group == 5))
        near = way[positions] < 65536 * 0.5 * 1.1 / 2**group - 0.5
        for side, rows in enumerate((near, ~near)):
            cells[min(group, 2)][side].append(np.ix_(rows, mine))
    for per, sides in zip((2, 4, 8), cells, strict=True):
        for side in sides:
            sizes = [folded[cell].size for cell in side]
            octets = stream(frames.pop(0), -(-sum(sizes) // per))
            digits = octets[:, None] >> np.arange(per) * 8 // per & (1 << 8 // per) - 1
            parts = np.split(digits.reshape(-1)[: sum(sizes)], np.cumsum(sizes)[:-1])
            for cell, part in zip(side, parts, strict=True):
                folded[cell] = part.reshape(folded[cell].shape)
    (count,) = struct.unpack("<I", count)
    symbols = np.concatenate([stream(distances, count), stream(excesses, count)])
    distance, excess = np.split(numbers(symbols, raw), 2)
    folded.reshape(-1)[np.cumsum(distance + 1) - 1] += excess
    level = np.where(folded % 2, (folded + 1) // 2, -(folded // 2))
    level = np.where(d[positions, None] < 2**15, -level, level)
    levels[columns[None], positions[:, None]] = level
    return levels


def column_dithered_levels(payload, n, s, d):
    first, excess_bits, excess, *frames = sections(payload)
    levels = np.zeros((len(s), n), np.int64)
    levels[s >= 1.1] = undithered_levels(first, n, s[s >= 1.1])
    way = np.minimum(d, 2**16 - 1 - d)
    classes = sum(way >= 2**16 * edge * s[:, None] - 0.5 for edge in (0.4, 1, 2, 3))
    places, folded, large = [], [], []
    for group, per_byte in ((s < 0.4, (4, 4, 4, 8, 8)), ((s >= 0.4) & (s < 1.1), [2] * 5)):
        for number, per in enumerate(per_byte):
            at = np.nonzero((classes == number) & group[:, None])
            octets = stream(frames[len(places)], -(-len(at[0]) // per))
            most = (1 << 8 // per) - 1
            digits = np.concatenate([octets >> i * 8 // per & most for i in range(per)])
            places.append(at)
            folded.append(digits[: len(at[0])].astype(np.int64))
            large.append(folded[-1] == most)
    count = sum(int(here.sum()) for here in large)
    more = numbers(stream(excess, count), excess_bits)
    for at, of_class, here in zip(places, folded, large, strict=True):
        of_class[here] += more[: here.sum()]
        more = more[here.sum() :]
        level = np.where(of_class % 2, (of_class + 1) // 2, -(of_class // 2))
        levels[at] = np.where(d[at] < 2**15, -level, level)
    return levels


def undithered_levels(payload, n, s):
    r = len(s)
    digits = np.select([s < 0.12, s < 0.4, s < 1.1], [8, 4, 2], 1)
    low = np.maximum(np.frexp(s)[1] - 1, 0)
    wide = np.flatnonzero(digits == 1)
    wide = wide[np.argsort(s[wide] / 2.0 ** low[wide], kind="stable")]
    parts = iter(sections(payload))
    raw, excess_bits, excess = (next(parts) for _ in range(3))

    def plane(rows):
        if not rows:
            return np.zeros((0, n), np.uint8)
        cut = runs(rows, max(1, min(8, rows * n // 8192)))
        return np.concatenate([stream(next(parts), height, n) for height in cut])

    levels = np.zeros((r, n), np.int64)
    of_wide = low[wide][:, None]
    values = numbers(plane(len(wide)), raw, of_wide)
    levels[wide] = (unfold(values >> of_wide) << of_wide) + values % (1 << of_wide)
    narrow = []
    for per in (2, 4, 8):
        columns = np.flatnonzero(digits == per)
        octets = plane(-(-len(columns) // per))
        for i, column in enumerate(columns.tolist()):
            levels[column] = octets[i // per] >> i % per * 8 // per & (1 << 8 // per) - 1
            narrow.append((column, (1 << 8 // per) - 1))
    largest = [(column, levels[column] == most) for column, most in narrow]
    count = sum(int(here.sum()) for _, here in largest)
    more, at = numbers(stream(excess, count), excess_bits), 0
    for column, here in largest:
        levels[column][here] += more[at : at + here.sum()]
        at += here.sum()
        levels[column] = unfold(levels[column])
    return levels


# Hidden states and attention maps


def zarr_array(path):
    store = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}
    return tensorstore.open(store, open=True).result().read().result()


def unmixed(codes, scale):
    width = codes.shape[-1]
    b = min(width & -width, 64)
    hadamard = np.ones((1, 1))
    while len(hadamard) < b:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    blocks = width // b
    k, j = np.ogrid[:blocks, :blocks]
    cosines = np.sqrt(2 / blocks) * np.cos(np.pi * k * (j + 0.5) / blocks)
    cosines[0] /= np.sqrt(2)
    states = codes.astype(float).reshape(*codes.shape[:-1], blocks, b) @ hadamard / np.sqrt(b)
    return (cosines.T @ states).reshape(codes.shape) * scale[..., None]


def signal_array(part, name, signal):
    """All slots of an array signal, decoded."""
    array = zarr_array(part / name)
    if signal["dtype"] == "int8":
        return unmixed(array, zarr_array(part / f"{name}-scale"))
    if signal["dtype"] == "uint8-log":
        return np.where(array == 0, 0, np.exp((array.astype(float) - 255) * 16 / 254))
    return array.astype(np.float32)


# A whole cache


def read_cache(cache: Path):
    """All rows of a cache whose parts are its own, as `open_cache(cache).read` names them."""
    manifest = read_json(cache / "manifest.json")
    assert manifest["version"] in (1, 2, 4)
    assert (manifest["version"] == 4) == any(p.get("writers") for p in manifest["parts"])
    without = {k: v for k, v in manifest.items() if k not in ("cache_id", "checksum")}
    assert digest(without) == manifest["cache_id"]
    rows = [r for part in manifest["parts"] for r in read_part(cache, part, manifest)]
    if manifest["version"] == 4:
        nothing = np.full(manifest["sequence_length"], np.nan, np.float32)
        rows = [{"writer_logprobs": nothing} | r for r in rows]
    return {name: np.stack([r[name] for r in rows]) for name in rows[0]}


def read_part(cache, part, manifest):
    place, tables, others = cache / part["path"], {}, {}
    for name, sha256 in part["statistics"].items():
        data = (place / "statistics" / name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == sha256
        if name.startswith("logits-"):
            tables[name[7:-4]] = np.load(place / "statistics" / name)
        if name.startswith(("counts-table-", "sketch-deviations")):
            others[name[:-4].removeprefix("counts-table-")] = np.load(place / "statistics" / name)
    arrays = {n: signal_array(place, n, s) for n, s in part["signals"].items() if "/" in n}
    gone = {(f["source"], f.get("document")) for f in part.get("forgotten", ())}
    numbers_ = part.get("numbers", range(len(part["units"])))
    for number, unit in zip(numbers_, part["units"], strict=True):
        files = {}
        for name in ("rows", *(n for n in part["signals"] if "/" not in n)):
            path, entry = place / name / f"unit-{number:05d}.array_record", unit["files"][name]
            data = path.read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (
                entry["bytes"],
                entry["sha256"],
            )
            ends = struct.pack("<Q", len(data)) + data[:4096] + data[-131072:]
            fingerprint = hashlib.sha256(ends).hexdigest()[:16]
            assert entry.get("fingerprint", fingerprint) == fingerprint
            files[name] = array_records(path)
            assert len(files[name]) == entry["records"]
        for name in arrays:
            commit = read_json(place / f"commits/{name.replace('/', '-')}-unit-{number:05d}.json")
            assert digest(commit["shards"]) == unit["files"][name]["sha256"]
        for offset in range(unit["rows"]):
            key, out, origins = row(files["rows"][offset])
            scored, of_row = targets(
                files["logits"][offset],
                key,
                tables,
                manifest["vocabulary_size"],
                part["signals"]["logits"],
            )
            out["loss_mask"] &= scored & (offset not in unit["skipped_rows"])
            if "writer_logprobs" in out:
                out["writer_logprobs"][~out["loss_mask"]] = np.nan
            for name, values in of_row.items():
                absent = 0 if name.endswith("ids") else -np.inf
                out[name] = np.full((len(scored), *values.shape[1:]), absent, values.dtype)
                out[name][scored] = values
            records = {n: files[n][offset] for n in ("counts", "sketch") if n in files}
            out |= companions(records, key, scored, of_row, part["signals"], others, manifest)
            for name, array in arrays.items():
                out[name] = array[number * part["unit_rows"] + offset]
            forget(out, origins, gone)
            yield out


def companions(records, key, scored, targets, signals, tables, manifest):
    """The arrays of counts and the sketch of a row, from their records."""
    out = {}
    for name, data in records.items():
        own_key, n, blocks = record(data, {"counts": 3, "sketch": 4}[name])
        assert own_key == key
        assert n in (0, scored.sum())
        at = np.flatnonzero(scored)[:n]
        if name == "sketch":
            out["sketch"] = np.zeros((len(scored), signals[name]["rank"]), np.float32)
            out["sketch_basis"] = np.zeros((), np.int32)
            if n:
                deviations = tables["sketch-deviations"]
                out["sketch"][at] = sketch(*blocks[6], n, signals[name], deviations, key)
            continue
        draws = signals[name]["draws"]
        out |= {key: np.zeros((len(scored), draws), np.int32) for key in ("count_ids", "counts")}
        if n:
            head = (
                targets.get("topk_ids", np.zeros((n, 0), int)),
                targets.get("topk_logprobs", np.zeros((n, 0))),
            )
            drawn = counts(blocks[5][1], n, draws, *head, tables, manifest["vocabulary_size"])
            for position, of_id in zip(at, drawn, strict=True):
                out["count_ids"][position, : len(of_id)] = list(of_id)
                out["counts"][position, : len(of_id)] = list(of_id.values())
    return out


def forget(out, origins, gone):
    """Blank the segments of forgotten documents."""
    for segment, (source, document, _) in enumerate(origins.tolist(), start=1):
        if (source, document) in gone or (source, None) in gone:
            here = out["segment_ids"] == segment
            for name, array in out.items():
                if name.startswith("attention/"):
                    array[:, here] = 0
                elif name == "sketch_basis":
                    continue
                elif name == "writer_logprobs":
                    array[here] = np.nan
                else:
                    array[here] = -np.inf if "_log" in name else 0


def count_codecs(cache: Path):
    """How often each (field, codec) occurs in the logits records of a cache."""
    return Counter(
        (field[0] if isinstance(field, tuple) else field, codec)
        for path in cache.glob("parts/*/logits/*")
        for data in array_records(path)
        for field, (codec, _) in record(data, 2)[2].items()
    )
