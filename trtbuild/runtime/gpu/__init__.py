"""Whole cases on a GPU: prepared there, their windows stitched there, labels out. `runtime/device.py` is the driver."""
