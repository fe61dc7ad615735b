"""Which files are images, by the ends of their names: the one table for folders, lists and galleries.

The pixels of a file are decoded by its content (images/pixels.py); the name decides only whether it is looked at.
"""

import os
from collections import Counter
from collections.abc import Iterable, Sequence

#: What images/pixels.py decodes, and the suffixes that such files have.
DECODED_FORMATS: dict[str, tuple[str, ...]] = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jif", ".jfif", ".jfi", ".pjpeg", ".pjp", ".jps", ".mpo"),
    "PNG": (".png", ".apng"),
    "WebP": (".webp",),
    "GIF": (".gif",),
    "AVIF": (".avif", ".avifs"),
    "HEIC": (".heic", ".heif", ".heics", ".heifs", ".hif"),
    "JPEG 2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    "TIFF": (".tif", ".tiff"),
    "BMP": (".bmp", ".dib"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "TGA": (".tga", ".icb", ".vda", ".vst"),
    "SGI": (".sgi", ".rgb", ".rgba", ".bw"),
    "PCX": (".pcx",),
    "QOI": (".qoi",),
}
IMAGE_SUFFIXES = frozenset(suffix for suffixes in DECODED_FORMATS.values() for suffix in suffixes)

#: Images all the same: files of these suffixes are never passed over in silence.
UNDECODED_SUFFIXES: dict[str, str] = {
    **dict.fromkeys(
        (
            *(".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".fff", ".gpr", ".iiq", ".k25", ".kdc"),
            *(".mdc", ".mef", ".mos", ".mrw", ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".rwl", ".sr2"),
            *(".srf", ".srw", ".x3f"),
        ),
        "raw data of a camera",
    ),
    **dict.fromkeys((".psd", ".psb", ".xcf", ".kra", ".ora", ".afphoto", ".clip", ".pdn"), "a file with layers"),
    **dict.fromkeys(
        (".svg", ".svgz", ".eps", ".ps", ".ai", ".pdf", ".wmf", ".emf", ".cdr", ".djvu"), "drawings or pages"
    ),
    **dict.fromkeys((".exr", ".hdr", ".pfm", ".fits", ".fit", ".fts"), "numbers of more than 8 bits a channel"),
    **dict.fromkeys((".dcm", ".dicom", ".nii", ".mha", ".mhd", ".nrrd", ".svs", ".ndpi", ".czi", ".lif"), "a scan"),
    **dict.fromkeys((".ico", ".cur", ".ani", ".icns"), "several icons"),
    **dict.fromkeys(
        (
            *(".jxl", ".jxr", ".wdp", ".hdp", ".bpg", ".flif", ".jls", ".jpm", ".mj2", ".dds", ".ktx", ".ktx2", ".blp"),
            *(".ftc", ".ftu", ".dcx", ".fli", ".flc", ".fpx", ".gbr", ".im", ".mic", ".mng", ".jng", ".msp", ".palm"),
            *(".pcd", ".pict", ".pct", ".pxr", ".ras", ".sun", ".wal", ".xbm", ".xpm", ".xwd", ".bufr", ".grib"),
            *(".iim", ".vtf"),
        ),
        "a format that is not decoded",
    ),
}

#: What is found beside images and is evidently none: ignored without a word.
_OTHER_SUFFIXES = frozenset(
    (
        *(".txt", ".md", ".rst", ".rtf", ".tex", ".doc", ".docx", ".odt", ".xls", ".xlsx", ".ods", ".ppt", ".pptx"),
        *(".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".xml", ".yaml", ".yml", ".toml", ".ini", ".cfg", ".conf"),
        *(".log", ".html", ".htm", ".css", ".js", ".py", ".pyc", ".ipynb", ".r", ".m", ".sh", ".bat", ".c", ".cpp"),
        *(".mat", ".npy", ".npz", ".pkl", ".pickle", ".pt", ".pth", ".h5", ".hdf5", ".hdf", ".parquet", ".arrow"),
        *(".feather", ".lmdb", ".mdb", ".db", ".sqlite", ".sqlite3", ".tfrecord", ".safetensors", ".onnx", ".bin"),
        *(".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".zst", ".iso", ".md5", ".sha1", ".sha256"),
        *(".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".wmv", ".mpg", ".mpeg", ".3gp", ".mts", ".m2ts"),
        *(".mp3", ".wav", ".flac", ".aac", ".m4a", ".ogg", ".opus", ".mid"),
        *(".xmp", ".aae", ".thm", ".exif", ".icc", ".icm", ".cube", ".pp3", ".dop", ".lnk", ".url", ".webloc"),
        *(".lock", ".tmp", ".part", ".crdownload", ".torrent", ".exe", ".dll", ".so", ".jar", ".obj", ".mtl", ".ply"),
    )
)
_OTHER_NAMES = frozenset(("readme", "license", "licence", "copying", "notice", "authors", "changelog", "checksums"))
_OTHER_NAMES |= {"makefile", "md5sums", "sha1sums", "sha256sums", "icon\r", "index", "labels", "classes"}
LIST_SUFFIXES = (".csv", ".tsv")  # of lists of images
CONVERT = "convert them to JPEG or PNG, or remove them"


def suffix_of(name: str) -> str:
    """Return the end of a file name from its last dot, in lower case; "" without one."""
    return os.path.splitext(name)[1].lower()


def is_image_name(name: str) -> bool:
    """Return whether a file of this name is taken for an image."""
    return suffix_of(name) in IMAGE_SUFFIXES


def is_undecoded(name: str) -> bool:
    """Return whether a file of this name is an image in a format that is not decoded."""
    return suffix_of(name) in UNDECODED_SUFFIXES


def is_doubtful_name(name: str) -> bool:
    """Return whether a file may be an image although it is not taken for one: raw data, drawings, unknown suffixes."""
    suffix = suffix_of(name)
    if suffix in IMAGE_SUFFIXES or suffix in _OTHER_SUFFIXES:
        return False
    return bool(suffix) or name.lower() not in _OTHER_NAMES


def count_suffixes(names: Iterable[str]) -> str:
    """Return how many names there are of each suffix, the most frequent first: "12 .cr2, 1 without a suffix"."""
    counts = Counter(suffix_of(name) for name in names)
    ordered = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    texts = [f"{count:,} {suffix or 'without a suffix'}" for suffix, count in ordered]
    more = f" and {len(texts) - 10} other suffixes" if len(texts) > 10 else ""
    return ", ".join(texts[:10]) + more


def left_out(names: Sequence[str]) -> str:
    """Return the note on files beside images that may be images and are not decoded."""
    what = "1 file beside the images is" if len(names) == 1 else f"{len(names):,} files beside the images are"
    return (
        f"{what} left out, not decoded by the suffix: {count_suffixes(names)}. To use such files, convert them to JPEG"
    )
