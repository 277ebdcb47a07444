"""A store that is read: any window by its number."""

import functools
from pathlib import Path

from distill_nemo.teacher_store.codecs.codec import Arrays
from distill_nemo.teacher_store.manifest import OUTPUT_LAYER, Contents, read_manifest, shard_name
from distill_nemo.teacher_store.shards import WRITE_AGAIN, Shard

OPEN_SHARDS = 64  # of a store at a time


class TeacherStore:
    """A complete store.

    Raises:
        ValueError: if it is not complete, or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest, contents = read_manifest(self.path)
        if contents is None:
            raise ValueError(
                f"{self.path} is not complete; run the command that wrote it again, which writes the missing shards"
            )
        self.contents: Contents = contents
        self._open = functools.lru_cache(OPEN_SHARDS)(self._open_shard)

    def __len__(self) -> int:
        return self.manifest.num_windows

    @property
    def sums(self) -> dict[Path, str]:
        """Files beside the manifest, with their SHA-256: the shards in order, and the output layer if there is one."""
        sums = {self.path / shard_name(i): shard.sha256 for i, shard in enumerate(self.contents.shards)}
        layer = self.contents.output_layer
        return sums if layer is None else sums | {self.path / OUTPUT_LAYER: layer}

    @property
    def num_tokens(self) -> int:
        """Tokens that count."""
        return sum(shard.tokens for shard in self.contents.shards)

    def window(self, number: int, with_targets: bool = True) -> Arrays:
        """Return a window, as `ShardWriter.append` took it; without targets, its tokens, mask and documents.

        Raises:
            ValueError: if its shard is damaged, or shorter than when it was opened.
            FileNotFoundError: if its shard is gone.
        """
        shard, place = divmod(number, self.manifest.windows_per_shard)
        opened = self._open(shard)
        opened.check()
        return opened.window(place, with_targets)

    def check(self) -> None:
        """Compare the size and the header of every shard with the manifest.

        Raises:
            ValueError: naming the shard.
        """
        for number in range(self.manifest.num_shards):
            self._open(number)

    def _open_shard(self, number: int) -> Shard:
        try:
            return Shard(self.path, self.manifest, number, self.contents.shards[number])
        except FileNotFoundError as error:
            raise ValueError(f"{error.filename} is missing; {WRITE_AGAIN}") from None
