"""Masks beside token files, which say which tokens count in losses and metrics. No torch.

`<prefix>.mask` holds one bit for each token of `<prefix>.bin`, in the same order, the first in the lowest bit of the
first byte. Megatron does not read it. Without it, all tokens count.
"""

from pathlib import Path

import numpy as np

from distill_nemo.data.chat_template import LossOn
from distill_nemo.data.token_files import iter_blocks
from distill_nemo.runtime.watched_file import WatchedFile


class TokenMask:
    """The mask of one pair of token files."""

    def __init__(self, prefix: str, only_last: bool = False) -> None:
        """Open the file.

        Args:
            prefix: of the token files; `check_files` has compared the sizes.
            only_last: of a document, only the last run of tokens that count does.
        """
        self._file = WatchedFile(f"{prefix}.mask")
        self._only_last = only_last

    def check(self) -> None:
        """Refuse a file that became shorter, see `WatchedFile.check`."""
        self._file.check()

    def of_document(self, first: int, length: int) -> np.ndarray:
        """Return the mask of a document, uint8 [length], whose first token has the number `first` in the file."""
        begin, offset = divmod(first, 8)
        found = self._file.read(np.uint8, (first + length + 7) // 8 - begin, begin)
        bits = np.unpackbits(found, bitorder="little")[offset : offset + length]
        if self._only_last and bits.any():
            stop = length - int(bits[::-1].argmax())
            gaps = np.flatnonzero(bits[:stop] == 0)
            bits[: gaps[-1] if gaps.size else 0] = 0
        return bits


def mask_of(prefix: str, loss_on: LossOn | None) -> TokenMask | None:
    """Return the mask beside token files for `DataConfig.loss_on`; None if all tokens count."""
    masked = Path(f"{prefix}.mask").exists() and loss_on != "all"
    return TokenMask(prefix, loss_on == "last") if masked else None


def write_mask(path: Path, parts: list[Path]) -> None:
    """Write a mask from files with one byte a token, in order."""
    rest = np.zeros(0, np.uint8)
    with open(path, "wb") as file:
        for block in (block for part in parts for block in iter_blocks(part)):
            bits = np.concatenate([rest, np.frombuffer(block, np.uint8)])
            whole = len(bits) // 8 * 8
            file.write(np.packbits(bits[:whole], bitorder="little"))
            rest = bits[whole:]
        file.write(np.packbits(rest, bitorder="little"))
