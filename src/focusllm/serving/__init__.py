"""Requests of several users, decoded together, and the server that takes them.

It knows prompts, jobs, one model that works for all of them, and what clients speak over HTTP. It does not know how a
chunk is read or a token decoded, which is `decoding`'s.

    at work        job         what was asked, and what became of it    scheduler       whose turn it is
                   sampling    logits to a token                        worker          the thread that has the model
    kept           files       uploads, read in the background          response_store  answers, to be gone on from
    at the door    gate        whose a request is, and how large         keys, settings, metrics, api_errors
    dialects       *_schema    what is sent     *_routes    what is answered       service     what they share
    a page         page/       for browsers, out of these dialects
"""
