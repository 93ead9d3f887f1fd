"""The verbs of the command line: arguments -> configuration -> step. One file per group of verbs, no logic.

Takes: words of a shell. Gives: what a step returned, printed. May touch: nothing itself.
"""
