"""A small world around fusion: a plain model, tree, pool and scheduler, and the real code of fusion between them.

Nothing here is SGLang but the ``ForwardBatch`` that fusion is given. What fusion promises can so be checked after
every step of thousands, token by token, against keys and values computed in fp64 from the tokens alone.
"""
