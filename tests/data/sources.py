"""Image sources that misbehave on purpose; a module of its own so that workers can import them."""

from __future__ import annotations

import resource
import time

import torch

from dinov2_fast.data.decoding import UnreadableImage
from dinov2_fast.data.image_source import ImageSource
from tests.data.pictures import encoded, picture


class Pictures(ImageSource):
    """Pictures in memory; image i is what `read` gives on any machine."""

    def __init__(self, count: int, *, px: int = 40, delay_s: float = 0.0) -> None:
        self.class_names = []
        self._count = count
        self._px = px
        self._delay_s = delay_s

    def __len__(self) -> int:
        return self._count

    def read(self, index: int) -> bytes:
        time.sleep(self._delay_s)
        return encoded(picture(self._px, self._px, seed=index), "PNG")

    def name(self, index: int) -> str:
        return f"picture {index}"


class Buggy(Pictures):
    """Raises what no source may raise."""

    def read(self, index: int) -> bytes:
        raise RuntimeError(f"a bug in reading image {index}")


class ThreadCounting(Pictures):
    """Refuses image 0 and gives the number of threads as the reason."""

    def read(self, index: int) -> bytes:
        if index == 0:
            raise UnreadableImage(f"{torch.get_num_threads()} threads")
        return super().read(index)


class Greedy(Pictures):
    """Leaves its process no room for files, and so none for shared memory."""

    def read(self, index: int) -> bytes:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        return super().read(index)
