"""Our own children and the real kernel: abilities are probed, never assumed, and every child is gone afterwards."""
