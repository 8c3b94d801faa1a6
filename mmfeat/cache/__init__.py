"""The HDF5 feature cache."""

from mmfeat.cache.index import StatIndex
from mmfeat.cache.keys import ContentKeys, content_keys
from mmfeat.cache.known import KnownKeys
from mmfeat.cache.rows import Rows
from mmfeat.cache.store import Cache, folder_name
from mmfeat.cache.writer import ShardWriter

__all__ = ["Cache", "ContentKeys", "KnownKeys", "Rows", "ShardWriter", "StatIndex", "content_keys", "folder_name"]
