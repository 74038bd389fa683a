"""From per-token losses to the scalar that is differentiated.

nll.py       loss of every supervised token of a batch
reduce.py    counts, coefficients and sums: the same objective for any split of a step
balancers/   task weights that move while training, one method a file
reweight.py  weights of single samples inside a task
regular.py   penalties on the adapter
router.py    the load-balancing loss of experts, which is none of it
"""
