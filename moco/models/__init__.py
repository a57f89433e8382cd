"""Networks: backbones, projection heads, and the momentum (EMA) update."""
