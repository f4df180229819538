"""Importing this package registers every Evo-ViT model with timm: `import models; timm.create_model('evo_deit_small_patch16_224')`."""

from . import evo_deit  # noqa: F401
