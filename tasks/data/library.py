"""All data that tasks can be built on, behind one door.

Owns: the data configuration of a process, the splits of image sets, and which of them stay in memory.
Must never know a file format (published.py and what it opens do) or a task.

Splits, in the published order of the n training examples: ``train`` is [0, 0.8 n), ``outer_valid`` is [0.9 n, n);
``test`` is the published test part. [0.8 n, 0.9 n) is learned_optimization's inner validation split, which nothing here
uses: leaving it out keeps the other two as published. (The reference takes 1 % of SVHN, CIFAR-100 and Food-101 by a
rounding bug; here it is 80 %.) A set that is published in the order of its classes, and a user's own, is put in a fixed
random order first; where there is no test part, the last fifth of that order is. ``digits``, scikit-learn's 1,797
images, is such a set: 1,437 for training (train 1,149, outer_valid 144) and 360 for testing.
"""

from __future__ import annotations

from collections import OrderedDict
from weakref import WeakValueDictionary

from configs.schema import DataConfig
from tasks.base import Datasets
from tasks.data.catalogue import channels, entry, own_kind
from tasks.data.corpora import OWN_TEXTS, open_corpus
from tasks.data.files import DataRoot
from tasks.data.images import ImageDataset, Pixels
from tasks.data.loading import load_pixels
from tasks.data.published import open_source
from tasks.data.text import load_text
from tasks.errors import DataError

Key = tuple[str, int, bool]


class Library:
    """The data sets of ``config``, each loaded once for all tasks of the process that use it.

    Image sets that no task uses any more are kept, the latest ones first, as long as all that are kept take no more
    than ``memory`` bytes, copies on other devices included.
    """

    def __init__(self, config: DataConfig, memory: int = 4 << 30) -> None:
        self.config = config
        self.root = DataRoot(config)
        self.memory = memory
        self._kept: OrderedDict[Key, Pixels] = OrderedDict()
        self._in_use: WeakValueDictionary[Key, Pixels] = WeakValueDictionary()

    def images(
        self,
        dataset: str,
        size: int,
        grey: bool = False,
        shift: int = 0,
        noise: float = 0.0,
        classes: int | None = None,
    ) -> Datasets:
        """The splits of an image set at ``size`` x ``size`` pixels, augmented alike in all of them.

        ``classes``: how many the task knows, so that a set of the user's own that has more is refused. Raises DataError
        for an unknown name, and for files that are missing, unreachable, truncated or malformed.
        """
        pixels = self._pixels(dataset, size, grey or channels(dataset) == 1)
        if classes is not None and pixels.classes > classes:
            raise DataError(f"{dataset}: expected labels below num_classes = {classes}, found {pixels.classes - 1}")
        n = pixels.training
        splits = (range(n * 8 // 10), range(n * 9 // 10, n), range(n, len(pixels)))
        return Datasets(*(ImageDataset(pixels, rows, size, shift, noise) for rows in splits))

    def text(self, corpus: str, vocabulary: str, vocab_size: int, sequence_length: int) -> Datasets:
        """The splits of a corpus as windows of ``sequence_length`` token ids below ``vocab_size``."""
        return load_text(corpus, vocabulary, vocab_size, sequence_length, self.root)

    def missing(self, name: str) -> str | None:
        """Why a data set, corpus or vocabulary cannot be had, None if it can; its files are looked for, not read.

        Raises DataError for a name that does not exist.
        """
        own = "image" if own_kind(name) else "text" if name.partition(":")[0] in OWN_TEXTS else None
        kind = own or entry(name).kind
        try:
            if own is None and entry(name).embedded:
                pass
            elif kind == "image":
                open_source(name, self.root)
            elif kind == "text":
                open_corpus(name, self.root)
            else:
                self.root.find([file.path for file in entry(name).files])
        except DataError as error:
            return str(error)
        return None

    def _pixels(self, dataset: str, size: int, grey: bool) -> Pixels:
        key = (dataset, size, grey)
        pixels = self._in_use.get(key)
        if pixels is None:
            pixels = load_pixels(dataset, size, grey, self.root)
            self._in_use[key] = pixels
        self._kept[key] = pixels
        self._kept.move_to_end(key)
        while len(self._kept) > 1 and sum(kept.bytes for kept in self._kept.values()) > self.memory:
            self._kept.popitem(last=False)
        return pixels
