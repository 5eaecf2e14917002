"""`focusllm bench`: how fast and how large, by length, against what one would otherwise run.

Knows contenders, clocks and memory. Does not know whether an answer is right.
"""
