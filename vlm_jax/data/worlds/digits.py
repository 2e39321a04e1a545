"""The digits world: 1,797 scans of handwritten digits that scikit-learn ships, 8 x 8 pixels each, with captions in words."""
from functools import cache
from typing import Any

import numpy as np

from vlm_jax.errors import ConfigError, DataError, did_you_mean

SPLITS = ("train", "validation", "test")
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PROMPTS = ("a handwritten {}", "the digit {}", "{}")
# Places in a fixed permutation of the scans where a split ends.
_ENDS = {"train": 1297, "validation": 1547, "test": 1797}


class DigitsSource:
    """Records of one split.

    A record has `image` uint8 [size, size, 3] (dark ink on white), `texts`, `label`, `attributes` {digit}, `group` (the label), `concept` (the word).
    """

    def __init__(self, split: str, size: int):
        self.name, self.split, self.size = f"digits/{split}", split, size
        self.class_names, self.prompts = list(WORDS), PROMPTS
        scans, labels, order = _scans()
        start = _ENDS.get({"validation": "train", "test": "validation"}.get(split, ""), 0)
        self._rows = order[start:_ENDS[split]]
        self._scans, self._labels = scans, labels

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        from PIL import Image
        row = self._rows[index]
        label = int(self._labels[row])
        ink = Image.fromarray(self._scans[row]).resize((self.size, self.size), Image.Resampling.BICUBIC)
        image = np.repeat(np.asarray(ink)[:, :, None], 3, axis=-1)
        word = WORDS[label]
        return {"image": image, "texts": _texts(label), "label": label, "attributes": {"digit": word}, "group": label, "concept": word}

    def texts_at(self, index: int) -> list[str]:
        """Returns the captions of record `index`."""
        return _texts(int(self._labels[self._rows[index]]))

    def describe(self, index: int) -> str:
        """Names record `index` in messages: `digits/train[3] (scan 1107)`."""
        return f"{self.name}[{index}] (scan {int(self._rows[index])})"

    def __reduce__(self):
        return DigitsSource, (self.split, self.size)


def digits_source(split: str = "train", size: int = 32) -> DigitsSource:
    """Returns one split of the digits: "train" (1,297 scans), "validation" (250) or "test" (250), enlarged to `size` pixels.

    Raises:
      ConfigError: for an unknown split, or a size that is not an integer of at least 8.
      DataError: if scikit-learn is not installed.
    """
    if split not in SPLITS:
        raise ConfigError(f'digits.split: "{split}" is unknown.{did_you_mean(split, SPLITS)}')
    if not isinstance(size, int) or isinstance(size, bool) or size < 8:
        raise ConfigError(f"digits.size is {size!r}; give an integer of at least 8, the size of the scans.")
    return DigitsSource(split, size)


def _texts(label: int) -> list[str]:
    return [prompt.format(WORDS[label]) for prompt in PROMPTS]


@cache
def _scans() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns scans uint8 [1797, 8, 8] with ink 0 on 255, labels, and the permutation that the splits are cut from."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("digits: scikit-learn is not installed; run `pip install scikit-learn`.") from error
    data = load_digits()
    scans = np.round(255 - data.images * (255 / 16)).astype(np.uint8)
    return scans, data.target.astype(np.int64), np.random.default_rng(0).permutation(len(scans))
