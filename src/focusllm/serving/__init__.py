"""Requests of several users, decoded together, and the server that takes them.

It knows prompts, jobs, one model that works for all of them, and the dialects that clients speak over HTTP.
It does not know how a chunk is read or a token decoded, which is `decoding`'s.

    job        what was asked, and what became of it so far        scheduler   whose turn it is
    sampling   logits to a token                                   worker      the thread that has the model
"""
