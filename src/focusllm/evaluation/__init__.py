"""Measuring: tasks (what is asked), methods (how long text reaches the model), one runner, one report.

Knows the front of the library and published benchmarks. Does not know what a method does with the text it is given.
"""
