"""Gradients of single tasks, and what can be made of them.

capture.py, gram.py   all K task gradients from one backward pass, and their inner products (coverage.py: of which
                      weights, and why not of others; order.py, blocks.py, selfcheck.py: how; halves.py: without noise)
aggregators/          one direction out of K gradients, one method a file
affinity.py           which tasks pull together: cosine, conflict, transfer, clusters
flat.py               steps towards flat minima
forget.py             which modules forget most when a task is added
"""
