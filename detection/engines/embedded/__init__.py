"""The embedded engine: Detectron2's R50-C4 Faster R-CNN from our own code and torchvision's ops.

Modules carry Detectron2's state-dict names, are built in its order and draw the same random
numbers, so a seed gives the same initial weights, and weights files fit both.
"""
