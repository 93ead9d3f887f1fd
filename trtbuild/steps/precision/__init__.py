"""Precision decided by measurement: calibrate a bundle's networks, gate the candidates, roll back the layers that hurt.

Does: binds trtbuild_calibration to graphs and runners. Takes: networks, calibration data, limits. Gives: scale tables,
typed networks and verdicts. May touch: calibration data (read), the calibration folder that it is given.
"""
