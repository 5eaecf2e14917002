"""The far context: token ids cut into chunks, read, and kept in as many bits and wherever the settings say.

Knows lengths, bytes, disks and what a text will cost. Does not know questions, answers, text or tokenizers.
"""
