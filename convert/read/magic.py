"""Content that is often found where safetensors should be, known by its first bytes."""

MAGIC = (
    (b"version https://git-lfs", "a git-lfs pointer, not the weights: run `git lfs pull` or `hf download`"),
    (b"<", "an HTML or XML page, not weights: the download failed; download the file again"),
    (b"{", "JSON, not weights: probably an error message of the server; download the file again"),
    (b"\x1f\x8b", "gzip-compressed: decompress it first"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed: decompress it first"),
    (b"\xfd7zXZ", "xz-compressed: decompress it first"),
    (b"GGUF", "a GGUF file under another name: this converter reads safetensors only"),
    (b"PK\x03\x04", "a zip file (PyTorch's pickle format): pickles are never opened; get the safetensors"),
    (b"\x80\x02", "a pickle: pickles are never opened; get the safetensors"),
    (b"age-encryption.org", "encrypted with age: decrypt it first"),
)


def what_it_is(start: bytes) -> str | None:
    """A name for well-known content that is not safetensors, by its first bytes (at least 9 where there are)."""
    if start[8:9] == b"{":
        return None
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    return next((what for magic, what in MAGIC if text.startswith(magic)), None)
