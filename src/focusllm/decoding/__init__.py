"""The engine: advances a set of requests by one token and returns; which rows a step reads anew.

Knows requests, chunks and the method. Does not know text, sampling, `generate()` or where a document came from.
"""
