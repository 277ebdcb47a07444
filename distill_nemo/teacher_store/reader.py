"""A store that is read: any window by its number."""

import functools
from pathlib import Path

from distill_nemo.teacher_store.codecs.codec import Arrays
from distill_nemo.teacher_store.manifest import OUTPUT_LAYER, Contents, read_store_manifest, shard_name
from distill_nemo.teacher_store.output_layer import OutputLayer
from distill_nemo.teacher_store.shards import Shard, check_size, shard_size

OPEN_SHARDS = 256  # of all stores at a time, in a process, which may often have 1,024 files open


class TeacherStore:
    """A complete store.

    Raises:
        ValueError: if it is not complete, or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest, contents = read_store_manifest(self.path)
        if contents is None:
            raise ValueError(
                f"{self.path} is not complete; run the command that wrote it again, which writes the missing shards"
            )
        self.contents: Contents = contents

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
        opened = _open_shard(self, shard)
        opened.check()
        return opened.window(place, with_targets)

    def check(self) -> None:
        """Compare the size of every file with the manifest. A shard's header is compared when it is opened.

        Raises:
            ValueError: naming the file.
        """
        for number, facts in enumerate(self.contents.shards):
            check_size(self.path / shard_name(number), shard_size(self.manifest, number, facts))
        if self.contents.output_layer is not None:
            OutputLayer(self.path, self.manifest)


@functools.lru_cache(OPEN_SHARDS)
def _open_shard(store: TeacherStore, number: int) -> Shard:
    return Shard(store.path, store.manifest, number, store.contents.shards[number])
