"""Files and folders to text, text to tokens, and back: what was read, what an answer says, and where it looked.

Knows file formats, tokenizers and places in a text. Does not know models, nor how an answer is computed.
"""
