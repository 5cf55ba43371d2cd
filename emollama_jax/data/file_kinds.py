"""What a file holds, by its first bytes and its container's brand, never by its name.

Endings only say which files of a folder are looked at. HEIF, AVIF and MP4 share one container
(ISO 14496-12); the brands in its `ftyp` box tell them apart. What is neither a picture nor a video
but well known (a document, a camera's raw file, an archive) is refused by name.

Nothing heavy is imported: a path is checked in no time.
"""

import io
import os
import pathlib
import re
import stat
from collections.abc import Iterator
from typing import BinaryIO, Literal

from emollama_jax.errors import UserError

Source = str | os.PathLike | bytes  # a path, or the file's content
Kind = Literal["picture", "heif", "heif sequence", "zip", "video", "unknown"]

PICTURES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".pjpeg", ".pjp", ".mpo", ".png", ".apng", ".webp", ".gif",
    ".bmp", ".dib", ".tif", ".tiff", ".avif", ".avifs", ".heic", ".heif", ".heics", ".heifs",
    ".hif", ".jp2", ".j2k", ".jpx", ".jpf", ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip
VIDEOS = (
    ".mp4", ".m4v", ".mov", ".qt", ".avi", ".divx", ".mkv", ".webm", ".mpg", ".mpeg", ".mpe",
    ".m2v", ".vob", ".ts", ".mts", ".m2ts", ".flv", ".f4v", ".wmv", ".asf", ".3gp", ".3g2", ".ogv",
    ".mxf", ".dv", ".rm", ".rmvb", ".h264", ".264", ".h265", ".265", ".hevc", ".ivf", ".nut",
)  # fmt: skip

HEAD = 4096  # bytes that tell
HOW_TO_CONVERT = "heif-convert IN.heic OUT.jpg, or on a Mac sips -s format jpeg IN.heic --out OUT"

_PICTURE_STARTS = (
    b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"BM", b"II*\0", b"MM\0*",
    b"II+\0", b"MM\0+", b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51",
    *(b"P%d%c" % (number, blank) for number in range(1, 7) for blank in b" \t\r\n#"),
)  # fmt: skip
_VIDEO_STARTS = (
    b"\x1aE\xdf\xa3", b"FLV\x01", b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", b"OggS", b"\0\0\x01\xba",
    b"\0\0\x01\xb3", b".RMF",
)  # fmt: skip
_MOVIE_BOXES = (b"moov", b"mdat", b"pnot", b"moof", b"styp", b"sidx")
_PADDING_BOXES = (b"free", b"skip", b"wide")

_STILLS = ("heic", "heix", "heim", "heis", "mif1", "mif2", "miaf", "MiHB", "avci", "j2ki", "jpeg")
_SEQUENCES = ("hevc", "hevx", "hevm", "hevs", "msf1", "avcs", "j2is", "jpgs")
_GENERIC = ("mif1", "mif2", "miaf", "msf1")  # of any codec: the other brands name it
_AVIF = ("avif", "avis")

# Where, what, and what is said of it.
_REFUSED: tuple[tuple[int, bytes, str], ...] = (
    (0, b"%PDF", "a PDF document: save its page as PNG"),
    (0, b"%!PS", "a PostScript document: save its page as PNG"),
    (0, b"8BPS", "a Photoshop document: export it as PNG"),
    (0, b"\xff\x0a", "JPEG XL, which cannot be read here: convert it to PNG"),
    (4, b"JXL \r\n", "JPEG XL, which cannot be read here: convert it to PNG"),
    (0, b"v/1\x01", "OpenEXR without a range of brightness: convert it to PNG"),
    (128, b"DICM", "a DICOM file: export its picture as PNG"),
    (0, b"\x93NUMPY", "a NumPy array: save it as PNG"),
    (0, b"Rar!", "an archive: unpack it and name what is in it"),
    (0, b"7z\xbc\xaf", "an archive: unpack it and name what is in it"),
    (0, b"\x1f\x8b", "a gzip archive: unpack it and name what is in it"),
    (0, b"version https://git-lfs", "a pointer of Git LFS, not the file itself: git lfs pull"),
    *(
        (start, mark, "a camera's raw file: develop it to JPEG or PNG")
        for start, mark in (
            (8, b"CR\x02"),
            (0, b"IIU\0"),
            (0, b"IIRO"),
            (0, b"IIRS"),
            (0, b"MMOR"),
            (0, b"FUJIFILMCCD-RAW"),
            (0, b"FOVb"),
            (0, b"\0MRM"),
            (8, b"crx "),
        )
    ),
)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # pathlib makes https:/ of https://


def check(source: Source) -> Kind:
    """What a file holds.

    Returns:
        "picture" or "heif" or "heif sequence", "zip", "video", or "unknown", which FFmpeg may know.

    Raises:
        UserError: missing, a URL, a directory, a pipe, empty, or known to be neither a picture
            nor a video.
    """
    head = _head(source)
    for start, mark, words in _REFUSED:
        if head.startswith(mark, start):
            raise UserError(f"{name_of(source)}: {words}")
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(b"<svg") or (text.startswith(b"<?xml") and b"<svg" in text):
        raise UserError(f"{name_of(source)}: an SVG drawing: export it as PNG")
    if text.startswith((b"<!doctype html", b"<html")):
        raise UserError(f"{name_of(source)}: a web page, not the file that it shows: download that")
    return _kind(source, head)


def _kind(source: Source, head: bytes) -> Kind:
    if head.startswith(_PICTURE_STARTS) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP"):
        return "picture"
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    names = brands(head)
    if names:
        return _of_brands(source, names)
    if head.startswith(_VIDEO_STARTS) or (head[:4] == b"RIFF" and head[8:12] == b"AVI "):
        return "video"
    return "video" if head[4:8] in _MOVIE_BOXES + _PADDING_BOXES else "unknown"


def _of_brands(source: Source, names: list[str]) -> Kind:
    major = names[0]
    if major in _AVIF or (major in _GENERIC and any(name in _AVIF for name in names)):
        return "picture"  # Pillow's, animations too
    if major in _STILLS + _SEQUENCES:
        boxes = set(_top_boxes(source))  # pictures lie in `meta`, the tracks of sequences in `moov`
        moves = b"moov" in boxes and (major in _SEQUENCES or b"meta" not in boxes)
        return "heif sequence" if moves else "heif"
    return "video"


def brands(head: bytes) -> list[str]:
    """The major brand and the compatible ones of an ISO container; none if it is no such file."""
    start = 0
    while head[start + 4 : start + 8] in _PADDING_BOXES:
        start += max(int.from_bytes(head[start : start + 4]), 8)
    if head[start + 4 : start + 8] != b"ftyp":
        return []
    end = start + int.from_bytes(head[start : start + 4])
    places = [start + 8, *range(start + 16, min(end, len(head)) - 3, 4)]
    return [head[place : place + 4].decode("latin-1") for place in places]


def _top_boxes(source: Source) -> Iterator[bytes]:
    """Types of a container's outermost boxes."""
    with open_binary(source) as file:
        start = 0
        while len(head := file.read(16)) >= 8:
            size = int.from_bytes(head[:4])
            size = int.from_bytes(head[8:16]) if size == 1 else size
            yield head[4:8]
            if size < 8:  # 0: to the end
                return
            start += size
            file.seek(start)


def open_binary(source: Source) -> BinaryIO:
    """An open file or its content."""
    return io.BytesIO(source) if isinstance(source, bytes) else pathlib.Path(source).open("rb")


def _head(source: Source) -> bytes:
    if isinstance(source, bytes):
        head = source[:HEAD]
    else:
        _refuse_urls(source)
        path = pathlib.Path(source)
        try:
            mode = path.stat().st_mode
            if stat.S_ISDIR(mode):
                raise UserError(f"{path}: is a directory, wanted a file")
            if not stat.S_ISREG(mode):
                raise UserError(f"{path}: a pipe or a device, wanted a file: save it to one first")
            with path.open("rb") as file:
                head = file.read(HEAD)
        except FileNotFoundError:
            raise UserError(f"{path}: no such file") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{name_of(source)}: cannot be read ({one_line(error)})") from None
    if not head:
        raise UserError(f"{name_of(source)}: is empty (0 bytes)")
    return head


def _refuse_urls(source: str | os.PathLike) -> None:
    text = os.fspath(source)
    if text.startswith("data:") and "," in text:
        raise UserError(f"{name_of(text)}: a data URI, wanted a file: decode it into one first")
    if _URL.match(text) and not os.path.exists(text):
        url = re.sub(r"^([^/]+:)/(?!/)", r"\1//", text)
        advice = "give only its path" if url.startswith("file:") else "download it first"
        raise UserError(f"{name_of(url)}: a URL, wanted a file: {advice}")


def name_of(source: Source) -> str:
    """Name of a file in messages."""
    if isinstance(source, bytes):
        return f"media of {len(source)} bytes"
    text = os.fspath(source)
    return text if len(text) <= 300 else f"{text[:60]}…"


def beginning(source: Source) -> str:
    """The first bytes as a message shows them."""
    text = _head(source)[:16].decode("ascii", "replace").encode("ascii", "backslashreplace")
    return repr(text.decode())


def one_line(error: BaseException) -> str:
    """Text of an exception, as part of a message."""
    words = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(words.split())
