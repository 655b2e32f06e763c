"""Which folders are parts of a set, such as train and test, and therefore not classes."""

import re
from collections import defaultdict
from collections.abc import Iterable

from gc_nc.data.folder_listing import Parts

_SPLITS = (
    *("train", "training", "val", "valid", "validation", "dev", "test", "testing"),
    *("eval", "evaluation", "holdout", "heldout", "pred", "unlabeled", "unlabelled"),
)
# Such names may also contain these words: "train_images", "test-set", "trainset".
_OF_A_SET = ("dataset", "data", "set", "split", "images", "image", "imgs", "img", "folder")
_SPLIT, _OTHER = "|".join(_SPLITS), f"(?:{'|'.join(_OF_A_SET)})*"
_OWN_NAME = re.compile(f"{_OTHER}({_SPLIT}){_OTHER}")
_LETTERS = re.compile(r"[^\W\d_]+")


def split_folders(siblings: Iterable[Parts]) -> set[Parts]:
    """The folders, among some in the same folder, that have names of splits.

    Case does not matter. A name may be one in itself, or beside others: "seg_train", "seg_test".
    """
    found, alike = set(), defaultdict(dict)
    for parts in siblings:
        words = _LETTERS.findall(parts[-1].casefold())
        if _OWN_NAME.fullmatch("".join(words)):
            found.add(parts)
        for i, word in enumerate(words):
            if word in _SPLITS:
                alike[*words[:i], "", *words[i + 1 :]].setdefault(word, []).append(parts)
    groups = (group for group in alike.values() if len(group) > 1)
    return found.union(*(parts for group in groups for parts in group.values()))
