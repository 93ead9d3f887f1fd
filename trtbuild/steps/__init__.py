"""One function per verb, and the only place that wires rooms together.

Does: turns a configuration into a finished artifact by calling the rooms in order.
Takes: one frozen configuration per step, and callbacks for progress. Gives: a bundle, files, or plain values to show.
May touch: only the paths it is given. It imports no foreign library itself; everything heavy is imported late.
"""
