"""The method: tensors and a Hugging Face model in, candidates and logits out; `focus` is the whole idea on one page.

Knows keys and values, rotary positions, attention, the seams of a base model (`base`) and the candidate projections.
Does not know where chunks are kept, what a request is, text, tokenizers or files.
"""
