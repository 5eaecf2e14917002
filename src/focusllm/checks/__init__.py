"""What can be said of a model before it is used: is the method right on it, what is it, what does a length cost.

Knows all rooms below. Does not change anything, and nothing below knows it.
"""
