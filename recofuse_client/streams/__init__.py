"""Streams of frames over gRPC that outlive their connections.

`Ledger` (ledger.py) keeps the books, and knows neither threads nor gRPC: which frame is to be sent, which ones wait for
an answer, what an answer or a broken connection means. `FrameStream` (blocking.py) and `AsyncFrameStream` (awaiting.py)
are the same loop around it, one with a thread that reads the frames, one with a task.

Two modes. `all`: every frame gets a result; no more than `window` are without one, which slows the source down; when
a connection breaks, what has no answer is sent again, and `resume_after` makes sure that nothing is answered twice.
`latest`: the newest frame counts; one that waits to be sent is replaced by a newer one, here as at the server, and what
was on its way when a connection broke is not sent again, because by then it is old.

What a newcomer would get wrong: a refused frame (the server is stopping, the key's rate is used up) of mode `all` is
no result. The stream is opened anew behind the last answer, after a pause, and the frame goes out again.
"""
