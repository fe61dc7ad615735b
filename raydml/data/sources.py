"""The addresses of the public benchmarks' archives, with the sizes and checksums of the files.

Sizes and checksums come from the tables of public libraries, named at each entry: they state what others received from
an address, not that it answers today.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Archive:
    """One file to fetch and the folder in it that holds the data set.

    url: http or https. file_name: its name on disk, ending in .zip, .tgz or .tar.gz. num_bytes: its size, None if
    unknown. sha256: of the file, None if unknown. folder: the top folder inside the archive that becomes root/<folder>.
    max_unpacked_bytes: an archive that holds more uncompressed is refused.
    """

    url: str
    file_name: str
    num_bytes: int | None
    sha256: str | None
    folder: str
    max_unpacked_bytes: int


@dataclass(frozen=True)
class DownloadSource:
    """How to get a benchmark. archives: what a program can fetch, perhaps nothing. by_hand: what a person can do."""

    archives: tuple[Archive, ...]
    by_hand: str


SOURCES: dict[str, DownloadSource] = {
    "cub200": DownloadSource(
        archives=(
            Archive(
                # Address: pytorch-metric-learning, datasets/cub.py. Many loaders give the md5
                # 97eceeb196236b17998738112f37df78 for it; torchvision-style loaders give the same md5 for a copy on
                # Google Drive, whose size and sha256 are in TensorFlow Datasets (url_checksums/caltech_birds2011.txt).
                url="https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
                file_name="CUB_200_2011.tgz",
                num_bytes=1_150_585_339,
                sha256="0c685df5597a8b24909f6a7c9db6d11e008733779a671760afef78feb49bf081",
                folder="CUB_200_2011",
                max_unpacked_bytes=4_000_000_000,
            ),
        ),
        by_hand=(
            "Fetch CUB_200_2011.tgz from https://data.caltech.edu/records/65de6-vp158 with a browser. "
            "Not the archive of 2010 (CUB-200), which has the same classes and other images."
        ),
    ),
    "cars196": DownloadSource(
        archives=(),
        by_hand=(
            "The official address (ai.stanford.edu/~jkrause/cars) has answered 404 since 2023. Get car_ims.tgz and "
            "cars_annos.mat from somebody who has them, or fetch a copy whose origin you trust. Public code names "
            "http://ftp.cs.stanford.edu/cs/cvgl/CARS196.zip (cars_annos.mat and the images); its checksum is unknown "
            "and raydml has not tried it."
        ),
    ),
    "sop": DownloadSource(
        archives=(
            Archive(
                # Address: ChainerCV. Size and sha256: TensorFlow Datasets (url_checksums/stanford_online_products.txt),
                # which gives them for this path at cs.stanford.edu by ftp.
                # Plain http is enough: the sha256 is checked.
                url="http://ftp.cs.stanford.edu/cs/cvgl/Stanford_Online_Products.zip",
                file_name="Stanford_Online_Products.zip",
                num_bytes=3_083_860_082,
                sha256="b04fa78210e69fab050ce73939550e1cd0f96890bdd98ec9fee732c3b756ef48",
                folder="Stanford_Online_Products",
                max_unpacked_bytes=12_000_000_000,
            ),
        ),
        by_hand=(
            "Fetch Stanford_Online_Products.zip with a browser: https://cvgl.stanford.edu/projects/lifted_struct, or "
            "the copy on Google Drive that the authors name, file 1TclrpQOF_ullUP99wk_gjGN8pKvtErG8."
        ),
    ),
    "inshop": DownloadSource(
        archives=(),
        by_hand=(
            "The authors share it on Google Drive, at https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion/"
            "InShopRetrieval.html: fetch Img/img.zip (the images of 256 x 256 px, not img_highres.zip) and "
            "Eval/list_eval_partition.txt, and unpack img.zip."
        ),
    ),
    "vehicleid": DownloadSource(
        archives=(),
        by_hand=(
            "PKU shares VehicleID on request, under a research agreement: https://www.pkuml.org. Unpack the files "
            "that you receive."
        ),
    ),
}
