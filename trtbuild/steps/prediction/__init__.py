"""Opened bundles, ready for one case after the other: what `trtbuild.open` returns.

Takes: paths of bundles. Gives: a Predictor. May touch: bundles (read), engines.
"""
