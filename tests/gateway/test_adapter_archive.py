"""Archives of adapters: what is taken, what is refused, and that nothing is ever written elsewhere."""

import gzip
import io
import json
import struct
import tarfile

import pytest

from coserve.server.gateway.adapter_archive import (
    CONFIG_FILE,
    TENSOR_FILE,
    ArchiveError,
    extract_adapter,
    pack_adapter,
    packed_size,
)

CONFIG = json.dumps({"peft_type": "LORA"}).encode()
TENSORS = bytes(range(256)) * 40
LIMIT = 1024**2

pytestmark = pytest.mark.security


def tar(members, *, fmt=tarfile.PAX_FORMAT, mode="w"):
    """A tar of (name, content) pairs or ready-made TarInfo objects."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=fmt) as archive:
        for member in members:
            info, content = (
                (member, b"") if isinstance(member, tarfile.TarInfo) else (tarfile.TarInfo(member[0]), member[1])
            )
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


GOOD = [(CONFIG_FILE, CONFIG), (TENSOR_FILE, TENSORS)]


def extract(tmp_path, data, limit=LIMIT):
    """Extract in a folder of its own; the names that stand in it afterwards."""
    archive, folder = tmp_path / "in.tar", tmp_path / "outer" / "folder"
    archive.write_bytes(data)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        extract_adapter(archive, folder, limit)
    finally:
        assert sorted(p.name for p in tmp_path.iterdir()) == ["in.tar", "outer"]
        assert [p.name for p in (tmp_path / "outer").iterdir()] == ["folder"]
        assert all(p.is_file() and not p.is_symlink() for p in folder.iterdir())
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("fmt", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("prefix", ["", "./", "my-adapter/", "./a/b/", "x" * 90 + "/" + "y" * 50 + "/"])
@pytest.mark.parametrize("compressed", [False, True])
def test_a_peft_folder_is_taken(tmp_path, fmt, prefix, compressed):
    data = tar([(prefix + name, content) for name, content in [*GOOD, ("README.md", b"# hi" * 999)]], fmt=fmt)
    assert extract(tmp_path, gzip.compress(data) if compressed else data) == dict(GOOD)


def test_a_folder_packed_as_people_do_it(tmp_path):
    source = tmp_path / "outer" / "folder"
    source.mkdir(parents=True)
    for name, content in GOOD:
        (source / name).write_bytes(content)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        archive.add(source, arcname="adapter")
    for name, _ in GOOD:
        (source / name).unlink()
    assert extract(tmp_path, buffer.getvalue()) == dict(GOOD)


@pytest.mark.parametrize(
    "member",
    [
        ("../evil", b"x"), ("a/../../evil", b"x"), ("/etc/evil", b"x"), ("..\\evil", b"x"), ("C:evil", b"x"),
        ("../" + CONFIG_FILE, CONFIG), ("x/../../" + TENSOR_FILE, TENSORS), ("/" + TENSOR_FILE, TENSORS),
        special("link", tarfile.SYMTYPE, "/etc/passwd"), special(CONFIG_FILE, tarfile.SYMTYPE, "/etc/passwd"),
        special("link", tarfile.LNKTYPE, CONFIG_FILE), special("dev", tarfile.CHRTYPE), special("dev", tarfile.BLKTYPE),
        special("pipe", tarfile.FIFOTYPE), special("odd", b"Z"), special("sparse", tarfile.GNUTYPE_SPARSE),
        ("adapter_model.bin", b"x"), ("model.pt", b"x"), ("a/b/optimizer.pkl", b"x"), ("training_args.bin", b"x"),
        ("modeling.py", b"x"), ("X.BIN", b"x"), (CONFIG_FILE, CONFIG), ("other/" + TENSOR_FILE, TENSORS),
    ],
    ids=lambda member: repr(member if isinstance(member, tarfile.TarInfo) else member[0])[-40:],
)  # fmt: skip
@pytest.mark.parametrize("first", [True, False])
def test_hostile_members_are_refused(tmp_path, member, first):
    members = [member, *GOOD] if first else [*GOOD, member]
    with pytest.raises(ArchiveError):
        extract(tmp_path, tar(members))


@pytest.mark.parametrize("members", [GOOD[:1], GOOD[1:], [], [("adapter_model.txt", b"")]])
def test_missing_files_are_named(tmp_path, members):
    with pytest.raises(ArchiveError, match="has no adapter_"):
        extract(tmp_path, tar(members))


def test_cut_off_and_damaged_archives(tmp_path):
    data = tar(GOOD)
    packed = gzip.compress(data)
    for length in (1, 100, 512, 700, 1024, 5000):
        with pytest.raises(ArchiveError):
            extract(tmp_path, data[:length])
        for path in (tmp_path / "outer" / "folder").iterdir():
            path.unlink()
    for damaged in (packed[:100], packed[:-9], b"\x1f\x8b" + b"\0" * 600, b"not a tar at all" * 100, b"\0" * 511, b""):
        with pytest.raises(ArchiveError):
            extract(tmp_path, damaged)
        for path in (tmp_path / "outer" / "folder").iterdir():
            path.unlink()
    flipped = bytearray(data)
    flipped[3] ^= 1
    with pytest.raises(ArchiveError, match="not a tar archive, or it is damaged"):
        extract(tmp_path, bytes(flipped))


def test_bombs(tmp_path):
    with pytest.raises(ArchiveError, match="more than"):
        extract(tmp_path, gzip.compress(tar([("zeros.txt", b"\0" * (3 * LIMIT)), *GOOD])))
    with pytest.raises(ArchiveError, match="at most"):
        extract(tmp_path, tar([(TENSOR_FILE, b"\0" * (LIMIT + 1))]))
    for path in (tmp_path / "outer" / "folder").iterdir():
        path.unlink()
    with pytest.raises(ArchiveError, match="members"):
        extract(tmp_path, tar([(f"{i}.txt", b"") for i in range(500)] + GOOD))
    with pytest.raises(ArchiveError, match="at most"):
        extract(tmp_path, tar([(CONFIG_FILE, b" " * (LIMIT + 1))], fmt=tarfile.USTAR_FORMAT), limit=4 * LIMIT)


def header(name=b"x", size=0, kind=b"0"):
    """A raw ustar header with a right checksum."""
    block = bytearray(512)
    block[: len(name)] = name
    block[124:136] = b"%011o\0" % size
    block[156:157] = kind
    block[257:263] = b"ustar\0"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize("kind", [b"x", b"g", b"L"])
def test_the_size_of_an_extension_header_is_bounded(tmp_path, kind):
    with pytest.raises(ArchiveError, match="extension header"):
        extract(tmp_path, header(size=0o77777777777, kind=kind) + tar(GOOD), limit=2**40)


def test_extension_headers_are_not_believed(tmp_path):
    for content in (
        b"99999 path=x\n",
        b"7 path=\xff\n",
        b"-3 a=b\n",
        b"4 x\n",
        b"12 size=1e9\n",
        b"30 GNU.sparse.major=1\n",
    ):
        with pytest.raises(ArchiveError):
            padded = content.ljust(512, b"\0")
            extract(tmp_path, header(size=len(content), kind=b"x") + padded + tar(GOOD))
        for path in (tmp_path / "outer" / "folder").iterdir():
            path.unlink()


def test_a_name_from_an_extension_header_is_checked_too(tmp_path):
    for name in ("../" * 60 + "evil", "/" + "a" * 150 + "/" + CONFIG_FILE):
        for fmt in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
            with pytest.raises(ArchiveError):
                extract(tmp_path, tar([(name, CONFIG), *GOOD], fmt=fmt))


def test_base_256_and_negative_sizes(tmp_path):
    block = bytearray(header())
    block[124:136] = b"\x80" + b"\0" * 3 + struct.pack(">Q", 2**62)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    with pytest.raises(ArchiveError):
        extract(tmp_path, bytes(block) + tar(GOOD))


def test_packing_is_deterministic_and_stock_tar_reads_it():
    def pack():
        files = {name: (io.BytesIO(content), len(content)) for name, content in reversed(GOOD)}
        return b"".join(pack_adapter(files))

    packed = pack()
    assert packed == pack() and len(packed) == packed_size([len(content) for _, content in GOOD])
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        assert {m.name: archive.extractfile(m).read() for m in archive.getmembers()} == dict(GOOD)
        assert all(m.mtime == 0 and m.uid == 0 and m.mode == 0o644 for m in archive.getmembers())


def test_what_was_packed_can_be_taken_again(tmp_path):
    files = {name: (io.BytesIO(content), len(content)) for name, content in GOOD}
    assert extract(tmp_path, b"".join(pack_adapter(files))) == dict(GOOD)
