"""`predict`: a folder, files, case lists or DICOM series become segmentations.

Does: lists cases, plans their memory, reads and prepares them in a process of its own, runs the network, writes.
Takes: a PredictConfig. Gives: a Summary with an Outcome per case. May touch: the images, and the output folder.
"""
