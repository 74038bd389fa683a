"""From rows in files to batches of tokens: readers -> formats -> tokenize -> store -> batching.

    readers/    rows of files, with their lines         formats/    columns to conversations
    tokenize/   chat templates, supervised tokens       store/      memory-mapped tokens of a task
    batching/   micro-batches of a step, packed         summary/    what `mtft check` tells of the data
    planning    from what a recipe asks to the plan that is played

Letters in names (`labels_BT` is [B, T]): B rows of a micro-batch, T positions, L tokens of one example, N examples of a
task, K tasks.
"""
