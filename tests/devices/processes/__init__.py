"""Several processes that train together, as the hosts of a cluster do.

``training`` is what each of them runs, ``launch`` starts and always ends them, and
``problem`` is what they train, with its solution written by hand.
"""
