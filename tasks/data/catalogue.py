"""What is known of every data set without reading it: kind, classes, shape, licence, and the files it is published as.

Owns: that table, and the names of data sets. Must never read data or use the network.

Sizes and checksums are those that TensorFlow Datasets records for its downloads (``url_checksums``, Apache 2.0); a
file for which none is published has None there. Besides the names in the table there are the user's own sets:
``folder:PATH``, ``idx:PATH``, ``npz:PATH`` and ``parquet:PATH`` (PATH below ``data.root``, or absolute, or a URL).
"""

from __future__ import annotations

from dataclasses import dataclass

from configs.checks import did_you_mean
from tasks.errors import DataError

OWN_IMAGES = ("folder", "idx", "npz", "parquet")
"""The kinds of a user's own image sets, as in ``folder:PATH``. Without grey they have three channels."""


@dataclass(frozen=True)
class RemoteFile:
    """A published file: its path below the data root, where it comes from, its bytes, and their SHA-256.

    ``archive``: it is a .tar.gz that is unpacked beside itself, for the files in it are what is read.
    """

    path: str
    url: str
    size: int | None = None
    sha256: str | None = None
    archive: bool = False


@dataclass(frozen=True)
class Entry:
    """One data set; ``side`` is the pixels along each side of an image (None: they differ)."""

    name: str
    kind: str  # "image", "text" or "vocabulary"
    title: str
    licence: str
    homepage: str
    files: tuple[RemoteFile, ...] = ()
    classes: int = 0
    channels: int = 0
    side: int | None = None
    embedded: bool = False
    by_hand: str = ""  # what to do where terms must be accepted before the download; no command fetches these

    @property
    def size(self) -> int:
        """Bytes to download, as far as they are known."""
        return sum(file.size or 0 for file in self.files)


def _mnist_like(name: str, base: str, files: dict[str, tuple[int, str]]) -> tuple[RemoteFile, ...]:
    return tuple(RemoteFile(f"{name}/{file}", f"{base}/{file}", *known) for file, known in files.items())


def _imagenet(side: int, files: dict[str, tuple[int, str]]) -> Entry:
    base = "https://image-net.org/data/downsample"
    return Entry(
        name=f"imagenet{side}",
        kind="image",
        title=f"Downsampled ImageNet, {side} x {side} (Chrabaszcz, Loshchilov & Hutter 2017)",
        licence="ImageNet terms of access: non-commercial research and education only; needs an account",
        homepage="https://image-net.org/download-images.php",
        by_hand="log in at https://image-net.org, accept the terms of access and download the files of the same names",
        files=tuple(RemoteFile(f"imagenet{side}/{file}", f"{base}/{file}", *known) for file, known in files.items()),
        classes=1000,
        channels=3,
        side=side,
    )


_WIKIPEDIA = (
    "https://huggingface.co/datasets/wikimedia/wikipedia/resolve/b04c8d1ceb2f5cd4588862100d08de323dccfbaa/20231101.en"
)

_ENTRIES = (
    Entry(
        name="digits",
        kind="image",
        title="Optical recognition of handwritten digits, the 1,797 test images (in scikit-learn)",
        licence="CC BY 4.0",
        homepage="https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits",
        classes=10,
        channels=1,
        side=8,
        embedded=True,
    ),
    Entry(
        name="glyphs",
        kind="image",
        title="The letters A to Z, drawn from the fonts that matplotlib ships (15,288 images)",
        licence="the fonts' own: DejaVu (Bitstream Vera), STIX, Computer Modern of BaKoMa",
        homepage="https://matplotlib.org/stable/users/explain/text/fonts.html",
        classes=26,
        channels=1,
        side=28,
        embedded=True,
    ),
    Entry(
        name="mnist",
        kind="image",
        title="MNIST handwritten digits (LeCun, Cortes & Burges 1998)",
        licence="CC BY-SA 3.0",
        homepage="https://yann.lecun.com/exdb/mnist/",
        files=_mnist_like(
            "mnist",
            "https://storage.googleapis.com/cvdf-datasets/mnist",
            {
                "train-images-idx3-ubyte.gz": (
                    9912422,
                    "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
                ),
                "train-labels-idx1-ubyte.gz": (
                    28881,
                    "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
                ),
                "t10k-images-idx3-ubyte.gz": (
                    1648877,
                    "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
                ),
                "t10k-labels-idx1-ubyte.gz": (4542, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
            },
        ),
        classes=10,
        channels=1,
        side=28,
    ),
    Entry(
        name="fashion_mnist",
        kind="image",
        title="Fashion-MNIST, pictures of clothes (Xiao, Rasul & Vollgraf 2017)",
        licence="MIT",
        homepage="https://github.com/zalandoresearch/fashion-mnist",
        files=_mnist_like(
            "fashion_mnist",
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
            {
                "train-images-idx3-ubyte.gz": (
                    26421880,
                    "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
                ),
                "train-labels-idx1-ubyte.gz": (
                    29515,
                    "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
                ),
                "t10k-images-idx3-ubyte.gz": (
                    4422102,
                    "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
                ),
                "t10k-labels-idx1-ubyte.gz": (5148, "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"),
            },
        ),
        classes=10,
        channels=1,
        side=28,
    ),
    Entry(
        name="kmnist",
        kind="image",
        title="Kuzushiji-MNIST, cursive Japanese characters (Clanuwat et al. 2018)",
        licence="CC BY-SA 4.0",
        homepage="http://codh.rois.ac.jp/kmnist/",
        files=_mnist_like(
            "kmnist",
            "http://codh.rois.ac.jp/kmnist/dataset/kmnist",
            {
                "train-images-idx3-ubyte.gz": (
                    18165135,
                    "51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4",
                ),
                "train-labels-idx1-ubyte.gz": (
                    29497,
                    "e38f9ebcd0f3ebcdec7fc8eabdcdaef93bb0df8ea12bee65224341c8183d8e17",
                ),
                "t10k-images-idx3-ubyte.gz": (
                    3041136,
                    "edd7a857845ad6bb1d0ba43fe7e794d164fe2dce499a1694695a792adfac43c5",
                ),
                "t10k-labels-idx1-ubyte.gz": (5120, "20bb9a0ef54c7db3efc55a92eef5582c109615df22683c380526788f98e42a1c"),
            },
        ),
        classes=10,
        channels=1,
        side=28,
    ),
    Entry(
        name="cifar10",
        kind="image",
        title="CIFAR-10 (Krizhevsky 2009)",
        licence="none stated by its authors; research use is customary",
        homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
        files=(
            RemoteFile(
                "cifar10/cifar-10-binary.tar.gz",
                "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
                170052171,
                "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            ),
        ),
        classes=10,
        channels=3,
        side=32,
    ),
    Entry(
        name="cifar100",
        kind="image",
        title="CIFAR-100, fine labels (Krizhevsky 2009)",
        licence="none stated by its authors; research use is customary",
        homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
        files=(
            RemoteFile(
                "cifar100/cifar-100-binary.tar.gz",
                "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
                168513733,
                "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
            ),
        ),
        classes=100,
        channels=3,
        side=32,
    ),
    Entry(
        name="svhn",
        kind="image",
        title="Street View House Numbers, cropped digits (Netzer et al. 2011)",
        licence="non-commercial use only",
        homepage="http://ufldl.stanford.edu/housenumbers/",
        files=(
            RemoteFile(
                "svhn/train_32x32.mat",
                "http://ufldl.stanford.edu/housenumbers/train_32x32.mat",
                182040794,
                "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8",
            ),
            RemoteFile(
                "svhn/test_32x32.mat",
                "http://ufldl.stanford.edu/housenumbers/test_32x32.mat",
                64275384,
                "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b",
            ),
        ),
        classes=10,
        channels=3,
        side=32,
    ),
    _imagenet(
        16,
        {
            "Imagenet16_train_npz.zip": (
                931837742,
                "dea57cdc1d4e252a9e4b76d3b0783486c13b572b883b25fae9283f19695e63b9",
            ),
            "Imagenet16_val_npz.zip": (36354395, "6dda90de8f6fd43b204422578b4be05d3f658d7792b344de4da768a71c02c4c4"),
        },
    ),
    _imagenet(
        32,
        {
            "Imagenet32_train_npz.zip": (
                3580435279,
                "94226337ecc1b0309d9fcd0167127aaadc931587035fbcb53925235edbaec4fc",
            ),
            "Imagenet32_val_npz.zip": (139697668, "013990e6dec1237dcd1f9beadbab81ead6604cc119af5cacbfb59ae28148377a"),
        },
    ),
    _imagenet(
        64,
        {
            "Imagenet64_train_part1_npz.zip": (
                6783426789,
                "9422dc1dc5d092e9814a70a1cb7fc74880d2db5d88a0cb8a34ee363b12bde3f1",
            ),
            "Imagenet64_train_part2_npz.zip": (
                6780506068,
                "9fafc115afb7e6c301e66dc16b2d737152b427bd5dab26e1293487a6819c7f30",
            ),
            "Imagenet64_val_npz.zip": (529522927, "e1e75133158a1924135a9c6f97a80d2d237b158945e0b34074e58e6c8430eeb8"),
        },
    ),
    Entry(
        name="food101",
        kind="image",
        title="Food-101 (Bossard, Guillaumin & Van Gool 2014)",
        licence="scientific fair use; the pictures are their Foodspotting owners'",
        homepage="https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
        files=(
            RemoteFile(
                "food101/food-101.tar.gz",
                "http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz",
                4996278331,
                "d97d15e438b7f4498f96086a4f7e2fa42a32f2712e87d3295441b2b6314053a4",
                archive=True,
            ),
        ),
        classes=101,
        channels=3,
    ),
    Entry(
        name="pydoc",
        kind="text",
        title="Topics of Python's own documentation (pydoc_data.topics of the interpreter)",
        licence="PSF License 2.0",
        homepage="https://docs.python.org/3/",
        embedded=True,
    ),
    Entry(
        name="lm1b",
        kind="text",
        title="One Billion Word Benchmark, shuffled sentences of news (Chelba et al. 2013)",
        licence="Apache 2.0 (the benchmark); the text is WMT 2011's news crawl",
        homepage="https://www.statmt.org/lm-benchmark/",
        files=(
            RemoteFile(
                "lm1b/1-billion-word-language-modeling-benchmark-r13output.tar.gz",
                "http://www.statmt.org/lm-benchmark/1-billion-word-language-modeling-benchmark-r13output.tar.gz",
                1792209805,
                "01ba60381110baf7f189dfd2b8374de371e8c9a340835793f190bdae9e90a34e",
            ),
        ),
    ),
    Entry(
        name="wikipedia",
        kind="text",
        title="English Wikipedia of 1 November 2023, cleaned, on the Hugging Face hub (11.7 GB)",
        licence="CC BY-SA 3.0 and GFDL",
        homepage="https://huggingface.co/datasets/wikimedia/wikipedia",
        files=tuple(
            RemoteFile(f"wikipedia/{shard}", f"{_WIKIPEDIA}/{shard}")
            for shard in (f"train-{index:05d}-of-00041.parquet" for index in range(41))
        ),
    ),
    Entry(
        name="shakespeare",
        kind="text",
        title="Tiny Shakespeare, 40,000 lines of his plays (Karpathy 2015)",
        licence="public domain",
        homepage="https://github.com/karpathy/char-rnn",
        files=(
            RemoteFile(
                "shakespeare/input.txt",
                "https://raw.githubusercontent.com/karpathy/char-rnn/370cbcd448eb7daf32f21a6be560b70e0b33c4e3/data/"
                "tinyshakespeare/input.txt",
                1115394,
                "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
            ),
        ),
    ),
    Entry(
        name="t5_32k",
        kind="vocabulary",
        title="T5's SentencePiece vocabulary of 32,000 pieces (Raffel et al. 2020), the originals' 32k",
        licence="Apache 2.0",
        homepage="https://huggingface.co/google-t5/t5-small",
        files=(
            RemoteFile(
                "vocabulary/t5_32k.model",
                "https://huggingface.co/google-t5/t5-small/resolve/main/spiece.model",
                791656,
                "d60acb128cf7b7f2536e8f38a5b18a05535c9e14c7a355904270e15b0945ea86",
            ),
        ),
    ),
)

CATALOGUE: dict[str, Entry] = {entry.name: entry for entry in _ENTRIES}
"""Every data set by its name, in the order in which lists show them."""


def entry(dataset: str) -> Entry:
    """The entry of a data set. Raises DataError, with a suggestion, for an unknown name."""
    if dataset not in CATALOGUE:
        own = ", ".join(f"{kind}:PATH" for kind in OWN_IMAGES)
        raise DataError(
            f"data set {dataset!r}: expected one of {', '.join(CATALOGUE)}, or {own}{did_you_mean(dataset, CATALOGUE)}"
        )
    return CATALOGUE[dataset]


def own_kind(dataset: str) -> str | None:
    """``folder``, ``idx``, ``npz`` or ``parquet`` for a user's own image set such as ``folder:PATH``, else None."""
    kind, colon, path = dataset.partition(":")
    return kind if colon and path and kind in OWN_IMAGES else None


def _image_entry(dataset: str) -> Entry:
    found = entry(dataset)
    if found.kind != "image":
        images = ", ".join(name for name, known in CATALOGUE.items() if known.kind == "image")
        raise DataError(f"data set {dataset!r} is {found.kind}: expected images, one of {images}")
    return found


def num_classes(dataset: str) -> int:
    """How many classes an image set has. Raises DataError for an unknown name, and for a set of the user's own."""
    if own_kind(dataset):
        raise DataError(f"data set {dataset!r}: how many classes it has must be given (num_classes of the task)")
    return _image_entry(dataset).classes


def channels(dataset: str) -> int:
    """1 for a grey image set, 3 for a colored one or one of the user's own. Raises DataError for an unknown name."""
    return 3 if own_kind(dataset) else _image_entry(dataset).channels
