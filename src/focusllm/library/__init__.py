"""Documents that are read once and kept: on disk, by chunks that any number of documents share, asked for ever.

Knows texts, where they are cut, which chunks they became, and what may be forgotten. Does not know how a chunk is read,
chosen or seen, nor how an answer is made: that is `FocusLLM`'s.
"""
