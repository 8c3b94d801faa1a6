"""Everything that commands import, imported at once for the server of tests/processes.py."""

from __future__ import annotations

import importlib

from mmfeat.encoders.torchvision_ops import import_torchvision

import_torchvision()  # before libraries that import torchvision as it is
for _name in (
    *("open_clip", "optuna.storages", "sklearn.linear_model", "skimage.feature", "timm"),
    *("transformers.models.bert.modeling_bert", "mmfeat.audit.audit", "mmfeat.cli.main", "mmfeat.finetune.finetune"),
    *("mmfeat.report.report", "mmfeat.sweep.train_all"),
):
    importlib.import_module(_name)
