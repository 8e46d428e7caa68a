"""A range of a flat vector, as PyTorch's DCP saves and loads one: ranks may cut it wherever their engine does."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from typing_extensions import Self


class FlatShard(Tensor):
    """Elements [start, start + n) of a vector of ``total``; shares the memory of ``local``.

    The three methods with underscores are DCP's protocol for tensors of one's own (torch.distributed._checkpointable, 2.11
    to 2.15). A DTensor would do for even cuts only.
    """

    start: int
    total: int

    @staticmethod
    def __new__(cls, local: Tensor, start: int, total: int) -> Self:
        shard: Self = torch.Tensor._make_subclass(cls, local)
        shard.start, shard.total = start, total
        return shard

    def size(self, *dimensions: int) -> Any:  # type: ignore[override]
        """Of the whole vector: what a checkpoint's entry is compared with."""
        return torch.Size([self.total])

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, TensorProperties(dtype=self.dtype), torch.Size([self.total])),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """None where the rank owns nothing of it."""
        size = self.numel()
        return [ChunkStorageMetadata(torch.Size([self.start]), torch.Size([size]))] if size else []

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self.as_subclass(Tensor)
