"""Training candidate projections: data, samples, losses, the loop, checkpoints, and what is kept of it.

Knows the method's passes and files of text. Does not know requests, documents or how an answer is decoded.
"""
