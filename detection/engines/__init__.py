"""Engines that train and run the detector: Detectron2 itself, or the embedded one."""
