"""Where the archives of the public benchmarks lie, and what is known of the files at these addresses.

A table of facts; nothing is fetched here. Sizes and checksums were compared with the tables of public libraries, named
at each entry: they say what others received from there, not that an address answers today.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Archive:
    """One file to fetch, and the one folder of it that is wanted.

    url: http or https. file_name: how it is called on disk, ending in .zip, .tgz or .tar.gz. num_bytes: its size, None
    where unknown. digest: "sha256:<hex>" or "md5:<hex>" of the file, None where unknown. verified: whether size and
    digest were seen in a published source; False means from memory. folder: the top folder inside the archive that
    becomes root/<folder>. max_unpacked_bytes: more than this uncompressed is refused as a bomb.
    """

    url: str
    file_name: str
    num_bytes: int | None
    digest: str | None
    verified: bool
    folder: str
    max_unpacked_bytes: int


@dataclass(frozen=True)
class Source:
    """How a benchmark is had. archives: what can be fetched, empty where nothing can. by_hand: what a person does."""

    archives: tuple[Archive, ...]
    by_hand: str


SOURCES: dict[str, Source] = {
    "cub200": Source(
        archives=(
            Archive(
                # The address: pytorch-metric-learning, datasets/cub.py. Many loaders pair it with the md5
                # 97eceeb196236b17998738112f37df78; torchvision-style loaders pair that md5 with a copy on Google Drive,
                # whose size and sha256 TensorFlow Datasets lists (url_checksums/caltech_birds2011.txt).
                url="https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
                file_name="CUB_200_2011.tgz",
                num_bytes=1_150_585_339,
                digest="sha256:0c685df5597a8b24909f6a7c9db6d11e008733779a671760afef78feb49bf081",
                verified=True,
                folder="CUB_200_2011",
                max_unpacked_bytes=4_000_000_000,
            ),
        ),
        by_hand=(
            "Fetch CUB_200_2011.tgz from https://data.caltech.edu/records/65de6-vp158 with a browser. "
            "Not the archive of 2010 (CUB-200), which has the same classes and other images."
        ),
    ),
    "cars196": Source(
        archives=(),
        by_hand=(
            "The official address (ai.stanford.edu/~jkrause/cars) has answered 404 since 2023. Get car_ims.tgz and "
            "cars_annos.mat from somebody who has them, or fetch a copy whose origin you trust. Seen in public code, "
            "never tried by us and without a known checksum: http://ftp.cs.stanford.edu/cs/cvgl/CARS196.zip, said to "
            "hold cars_annos.mat and the images."
        ),
    ),
    "sop": Source(
        archives=(
            Archive(
                # The address: ChainerCV. Size and sha256: TensorFlow Datasets (url_checksums/
                # stanford_online_products.txt), which gives them for this path at cs.stanford.edu by ftp.
                # Plain http is enough: what comes back is held against the sha256.
                url="http://ftp.cs.stanford.edu/cs/cvgl/Stanford_Online_Products.zip",
                file_name="Stanford_Online_Products.zip",
                num_bytes=3_083_860_082,
                digest="sha256:b04fa78210e69fab050ce73939550e1cd0f96890bdd98ec9fee732c3b756ef48",
                verified=True,
                folder="Stanford_Online_Products",
                max_unpacked_bytes=12_000_000_000,
            ),
        ),
        by_hand=(
            "Fetch Stanford_Online_Products.zip with a browser: https://cvgl.stanford.edu/projects/lifted_struct, or "
            "the copy on Google Drive that the authors name, file 1TclrpQOF_ullUP99wk_gjGN8pKvtErG8."
        ),
    ),
    "inshop": Source(
        archives=(),
        by_hand=(
            "The authors give it out on Google Drive, from https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion/"
            "InShopRetrieval.html: fetch Img/img.zip (the images of 256 x 256 px, not img_highres.zip) and "
            "Eval/list_eval_partition.txt, and unpack img.zip."
        ),
    ),
    "vehicleid": Source(
        archives=(),
        by_hand=(
            "PKU gives VehicleID out on request and under an agreement for research: https://www.pkuml.org. Unpack "
            "what you receive."
        ),
    ),
}
