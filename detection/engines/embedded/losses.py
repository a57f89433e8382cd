"""fvcore's smooth-L1 loss: its gradient is Detectron2's to the last bit, torch's is not."""

import warnings

with warnings.catch_warnings():
    # Importing fvcore.nn compiles with torch.jit.script, which torch >= 2.13 calls deprecated; a
    # user can do nothing about it.
    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", DeprecationWarning)
    from fvcore.nn import smooth_l1_loss

__all__ = ["smooth_l1_loss"]
