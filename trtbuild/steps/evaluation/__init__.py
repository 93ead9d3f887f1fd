"""`evaluate`: a folder of predictions beside one of references becomes a summary.json.

Does: pairs files, compares them in several processes. Takes: an EvaluateConfig. Gives: a report.
May touch: both folders (read), the summary.
"""
