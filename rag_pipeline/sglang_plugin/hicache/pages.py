"""Host memory as SGLang's storage backends expect it: pages of one size, each a run of bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from chunk_cache import Buffer


class HostPages:
    """What SGLang calls a host KV pool, with bytes in place of KV: as many pages as one call moves.

    Backends read these names; a page is a token to them, and the model has one buffer per page, as MLA models do.

    Parameters
    ----------
    number : int
        Pages.
    page_bytes : int
        Bytes of one.
    """

    page_size = 1
    layout = "page_first"
    dtype = torch.uint8
    layer_num = 1
    allocator = None

    def __init__(self, number: int, page_bytes: int) -> None:
        self.kv_buffer = torch.zeros((number, page_bytes), dtype=torch.uint8)
        self.page_num = self.size = number
        self.page_bytes = page_bytes

    def get_ksize_per_token(self) -> int:
        """Bytes of a page."""
        return self.page_bytes

    get_size_per_token = get_ksize_per_token

    def get_page_buffer_meta(self, indices: torch.Tensor) -> tuple[list[int], list[int]]:
        """Address and bytes of each page."""
        return [self.kv_buffer[i].data_ptr() for i in indices.tolist()], [
            self.page_bytes
        ] * indices.numel()

    def get_data_page(self, index: int, flat: bool = True) -> torch.Tensor:
        """View of a page, uint8 ``[page_bytes]``."""
        return self.kv_buffer[int(index)]

    def get_dummy_flat_data_page(self) -> torch.Tensor:
        """Room for a page, uint8 ``[page_bytes]``."""
        return torch.zeros(self.page_bytes, dtype=torch.uint8)

    def set_from_flat_data_page(self, index: int, page: torch.Tensor) -> None:
        """Copy a page in."""
        self.kv_buffer[int(index)].copy_(page)

    def fill(self, pages: Sequence[Buffer]) -> torch.Tensor:
        """Copy pages in, the rest of a short one zeros; returns their indices."""
        for index, data in enumerate(pages):
            row = self.kv_buffer[index]
            row[len(data) :] = 0
            row[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return torch.arange(len(pages))

    def take(self, index: int) -> bytes:
        """Copy a page out."""
        data: bytes = self.kv_buffer[index].numpy().tobytes()
        return data
