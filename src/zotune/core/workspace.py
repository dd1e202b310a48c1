"""Small buffers that are used again and again; they live with the kernels, which use most of them."""

from zotune.kernels.workspace import workspace

__all__ = ["workspace"]
