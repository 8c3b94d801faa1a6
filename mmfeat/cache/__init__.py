"""The HDF5 feature cache."""

from mmfeat.cache.keys import ContentKeys, content_keys
from mmfeat.cache.rows import Rows
from mmfeat.cache.store import Cache, folder_name
from mmfeat.cache.writer import ShardWriter

__all__ = ["Cache", "ContentKeys", "Rows", "ShardWriter", "content_keys", "folder_name"]
