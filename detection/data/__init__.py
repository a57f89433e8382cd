"""VOC-format data: checked before training, transformed and streamed as Detectron2 does."""
