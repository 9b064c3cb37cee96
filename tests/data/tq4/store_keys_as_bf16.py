# SPDX-License-Identifier: Apache-2.0
"""Rewrites a TQ4 golden container with its tensors `k` and `v` stored as BF16 in place of F32, without loss.

The values are bfloat16 numbers to begin with, so the low half of each float32 is zero; a value for which that
does not hold stops the program. Everything else is copied byte for byte.
Usage: store_keys_as_bf16.py IN.gguf OUT.gguf
"""
import array
import struct
import sys

F32, BF16, ALIGNMENT = 0, 30, 32
SCALAR = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
BYTES = {0: 4, 24: 1, 25: 2, 26: 4, 30: 2}  # bytes a value of F32, I8, I16, I32, BF16


class Reader:
    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, form):
        values = struct.unpack_from("<" + form, self.data, self.at)
        self.at += struct.calcsize("<" + form)
        return values[0]

    def string(self):
        n = self.take("Q")
        self.at += n
        return self.data[self.at - n : self.at]

    def skip_value(self, kind):
        if kind == 8:
            self.string()
        elif kind == 9:
            inner = self.take("I")
            for _ in range(self.take("Q")):
                self.skip_value(inner)
        else:
            self.take(SCALAR[kind])


def padded(n):
    return (n + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


def main(source, target):
    data = open(source, "rb").read()
    reader = Reader(data)
    assert data[:4] == b"GGUF"
    reader.take("II")
    n_tensor, n_key = reader.take("Q"), reader.take("Q")
    for _ in range(n_key):
        key = reader.string()
        assert key != b"general.alignment"
        reader.skip_value(reader.take("I"))
    head = data[: reader.at]
    tensors = []
    for _ in range(n_tensor):
        name = reader.string()
        dims = [reader.take("Q") for _ in range(reader.take("I"))]
        tensors.append((name, dims, reader.take("I"), reader.take("Q")))
    base = padded(reader.at)

    table, body = b"", b""
    for name, dims, kind, offset in tensors:
        n = 1
        for dim in dims:
            n *= dim
        payload = data[base + offset : base + offset + n * BYTES[kind]]
        if name in (b"k", b"v"):
            assert kind == F32
            halves = array.array("H", payload)  # little-endian hosts: low half first
            assert not any(halves[0::2]), f"{name}: a value is no bfloat16 number"
            payload, kind = halves[1::2].tobytes(), BF16
        table += struct.pack("<Q", len(name)) + name + struct.pack("<I", len(dims))
        table += struct.pack(f"<{len(dims)}Q", *dims) + struct.pack("<IQ", kind, len(body))
        body += payload + bytes(padded(len(payload)) - len(payload))
    start = head + table
    with open(target, "wb") as out:
        out.write(start + bytes(padded(len(start)) - len(start)) + body)


if __name__ == "__main__":
    main(*sys.argv[1:])
