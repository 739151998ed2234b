"""What may happen to a file: drawn as a name and some numbers, which mean the same for any file."""

from __future__ import annotations

import copy
import io
import json
import pickletools
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st

Numbers = tuple[int, int, int]
Step = tuple[str, Numbers]

SIZES = (0, 1, 2, 7, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1)
WIDTHS = (1, 2, 4, 8)
SCRAPS = (
    b"\0",
    b"\0" * 100,
    b"\x80\x02.",
    *(b"PK" + x for x in (b"\3\4", b"\1\2", b"\5\6", b"\6\6")),
)


def steps(kinds: dict[str, Any], most: int = 4) -> st.SearchStrategy[list[Step]]:
    """Some mutations, one after the other."""
    number = st.integers(0, 2**20)
    step = st.tuples(st.sampled_from(sorted(kinds)), st.tuples(number, number, number))
    return st.lists(step, min_size=1, max_size=most)


def of_bytes(content: bytes, taken: Sequence[Step], others: Sequence[bytes]) -> bytes:
    """Any file, changed where it comes.

    Args:
        content: the file.
        taken: the mutations.
        others: files that may be spliced to it.
    """
    for name, (a, b, c) in taken:
        content = BYTES[name](content, a % (len(content) + 1), b, c, others[c % len(others)])
    return content


def _flipped(x: bytes, bit: int) -> bytes:
    return bytes(value ^ (1 << bit) for value in x)


def _number(x: bytes, at: int, b: int, c: int, _: bytes) -> bytes:
    width = WIDTHS[b % 4]
    size = SIZES[c % len(SIZES)] % 2 ** (8 * width)
    return x[:at] + size.to_bytes(width, "little") + x[at + width :]


def _swapped(x: bytes, at: int, b: int, c: int, _: bytes) -> bytes:
    end = at + b % 64
    later = end + c % 64
    return x[:at] + x[end:later] + x[at:end] + x[later:]


BYTES: dict[str, Callable[[bytes, int, int, int, bytes], bytes]] = {
    "bit": lambda x, at, b, *_: x[:at] + _flipped(x[at : at + 1], b % 8) + x[at + 1 :],
    "byte": lambda x, at, b, *_: x[:at] + bytes([b % 256]) + x[at + 1 :],
    "end": lambda x, at, *_: x[:at],
    "gap": lambda x, at, b, *_: x[:at] + x[at + b % 64 :],
    "more": lambda x, at, b, *_: x[:at] + SCRAPS[b % len(SCRAPS)] + x[at:],
    "again": lambda x, at, b, *_: x[: at + b % 64] + x[at:],
    "swap": _swapped,
    "number": _number,
    "splice": lambda x, at, b, _, other: x[:at] + other[b % (len(other) + 1) :],
}


def _global(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


GLOBALS = (
    *("posix.system", "os.system", "builtins.eval", "builtins.exec", "builtins.getattr"),
    *("builtins.bytearray", "builtins.set", "builtins.complex", "_codecs.encode"),
    *("collections.OrderedDict", "collections.Counter", "subprocess.Popen", "torch.load"),
    *("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2", "torch.Size"),
    *("torch._utils._rebuild_tensor_v3", "torch._utils._rebuild_parameter", "torch.device"),
    *("torch._utils._rebuild_sparse_tensor", "torch._utils._rebuild_qtensor", "torch.Tensor"),
    *("torch._utils._rebuild_meta_tensor_no_storage", "torch._utils._rebuild_nested_tensor"),
    *("torch._utils._rebuild_parameter_with_state", "torch._utils._rebuild_wrapper_subclass"),
    *("torch._utils._rebuild_device_tensor_from_numpy", "torch._tensor._rebuild_from_type_v2"),
    *("torch.FloatStorage", "torch.storage.UntypedStorage", "torch.storage.TypedStorage"),
    *("torch.FloatTensor", "torch.sparse.FloatTensor", "torch.serialization._get_layout"),
    *("torch.float64", "torch.int8", "torch.per_channel_affine", "torch.nn.parameter.Parameter"),
)
CANARY = "open('canary', 'w')"


def _text(text: str) -> bytes:
    encoded = text.encode("utf-8", "surrogatepass")
    return b"X" + len(encoded).to_bytes(4, "little") + encoded


def _integer(number: int) -> bytes:
    data = number.to_bytes(9, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


OPCODES = (
    *(bytes([code]) for code in b"RbQ\x81sueat\x85\x86\x87()]}N\x88\x890.\x8f"),
    *(b"h" + bytes([slot]) for slot in (0, 1, 2, 3, 4, 10, 13, 20, 255)),
    *(b"q" + bytes([slot]) for slot in (0, 3, 13)),
    *(_integer(size) for size in (-1, *SIZES)),
    *(_text(text) for text in ("", "0", "1", "cpu", "meta", "cuda", "storage", "a.weight_g", "\0")),
    *(_text(text) for text in ("\ud800", "__metadata__", "a.weight")),
    *(_global(name) for name in GLOBALS),
    _global("builtins.eval") + _text(CANARY) + b"\x85R",
    _global("posix.system") + _text("touch canary") + b"\x85R",
    _global("builtins.bytearray") + _integer(2**36) + b"\x85R",
    _global("torch.FloatTensor") + _integer(2**36) + b"\x85R",
    b"G" + bytes(8),
    b"\x80\x04",
)


def of_pickle(content: bytes, taken: Sequence[Step]) -> bytes:
    """A pickle, changed by whole operations."""
    starts = [position for *_, position in pickletools.genops(content)]
    ends = [*starts[1:], len(content)]
    codes = [content[i:j] for i, j in zip(starts, ends, strict=True)]
    for name, (a, b, c) in taken:
        at, code = a % (len(codes) + 1), OPCODES[b % len(OPCODES)]
        end = at + c % 8
        codes = PICKLES[name](codes, at, end, code)
    return b"".join(codes)


def _numbers_there(codes: list[bytes], at: int, code: bytes) -> list[bytes]:
    """The first number from there on is another one: a size, a stride, an offset."""
    for position in range(at, len(codes)):
        if codes[position][:1] in (b"K", b"M", b"J"):
            return [*codes[:position], code, *codes[position + 1 :]]
    return codes


PICKLES: dict[str, Callable[[list[bytes], int, int, bytes], list[bytes]]] = {
    "drop": lambda x, i, j, _: x[:i] + x[j:],
    "again": lambda x, i, j, _: x[:j] + x[i:],
    "insert": lambda x, i, _, code: [*x[:i], code, *x[i:]],
    "replace": lambda x, i, _, code: [*x[:i], code, *x[i + 1 :]],
    "size": lambda x, i, j, _: _numbers_there(x, i, _integer(SIZES[j % len(SIZES)] % 2**63)),
    "function": lambda x, i, j, _: _functions_there(x, i, _global(GLOBALS[j % len(GLOBALS)])),
}


def _functions_there(codes: list[bytes], at: int, code: bytes) -> list[bytes]:
    for position in range(at, len(codes)):
        if codes[position][:1] == b"c":
            return [*codes[:position], code, *codes[position + 1 :]]
    return codes


def of_zip(content: bytes, taken: Sequence[Step], others: Sequence[bytes]) -> bytes:
    """A file of torch, changed by its parts; the checksums are those of the new contents."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        parts = [(part.filename, archive.read(part)) for part in archive.infolist()]
    packing = [zipfile.ZIP_STORED] * 1000
    for name, (a, b, c) in taken:
        at = a % len(parts)
        part, inside = parts[at]
        step = [(sorted(BYTES)[b % len(BYTES)], (b, c, a))]
        if name == "drop" and len(parts) > 1:
            del parts[at]
        elif name == "rename":
            parts[at] = (parts[b % len(parts)][0], inside)
        elif name == "again":
            parts.append((part, parts[b % len(parts)][1]))
        elif name == "content":
            parts[at] = (part, of_bytes(inside, step, others))
        elif name == "pack":
            packing[at] = zipfile.ZIP_DEFLATED
        elif name == "zeros":
            parts[at] = (part, bytes(1 << b % 24))
            packing[at] = zipfile.ZIP_DEFLATED
    return zipped(parts, packing)


PARTS = dict.fromkeys(["drop", "rename", "again", "content", "pack", "zeros"])


def zipped(parts: Sequence[tuple[str, bytes]], packing: Sequence[int] = ()) -> bytes:
    """A zip file with these parts."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for position, (name, content) in enumerate(parts):
            how = packing[position] if packing else zipfile.ZIP_STORED
            archive.writestr(zipfile.ZipInfo(name), content, how)
    return file.getvalue()


VALUES: tuple[Any, ...] = (
    *(None, True, 0, 1, -1, 3, 2**31, 2**62, 2**63, 2**64, 10**30, 0.5, 1e400, "", "\0"),
    *(
        "F32",
        "I64",
        "BF16",
        "F4",
        "U64",
        "BOOL",
        "..",
        "/etc/passwd",
        "../in",
        ".",
        "\ud800",
        "in.safetensors",
    ),
    *([], {}, [[]], [0, 2**62], [-1], [4, 1], [2**32, 2**32], [0] * 70, {"a": {}}, [0, 0], [8, 4]),
)


def of_json(content: bytes, taken: Sequence[Step]) -> bytes:
    """JSON, changed by its values and keys."""
    root = json.loads(content)
    for name, (a, b, _) in taken:
        places = list(_places(root))
        if not places:
            break
        inside, key = places[a % len(places)]
        if name == "value":
            inside[key] = copy.deepcopy(VALUES[b % len(VALUES)])
        elif name == "drop":
            del inside[key]
        elif name == "copy":
            other, place = places[b % len(places)]
            inside[key] = copy.deepcopy(other[place])
        elif name == "key" and isinstance(inside, dict):
            inside[str(VALUES[b % len(VALUES)])] = inside.pop(key)
    return json.dumps(root).encode()


JSON = dict.fromkeys(["value", "drop", "copy", "key"])


def _places(node: Any) -> Any:
    """Every value below a node: what holds it, and by which key."""
    items = list(node.items()) if isinstance(node, dict) else list(enumerate(node))
    for key, value in items:
        yield node, key
        if isinstance(value, (dict, list)):
            yield from _places(value)
