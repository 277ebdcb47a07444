"""All codecs by name."""

from typing import Literal

from distill_nemo.teacher_store.codecs.codec import Codec
from distill_nemo.teacher_store.codecs.hidden import Hidden
from distill_nemo.teacher_store.codecs.sampled import Sampled
from distill_nemo.teacher_store.codecs.top_k import TopK

CodecName = Literal["sampled", "top_k", "hidden"]
CODECS: dict[str, type[Codec]] = {codec.name: codec for codec in (Sampled, TopK, Hidden)}
