"""The border to transformers and the hub: `generate()`, `from_pretrained`, adapter files, the models that are at hand.

Knows names, folders, downloads, types and devices. Does not know documents or questions.
"""
