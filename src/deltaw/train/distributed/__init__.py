"""Several processes that train as one: who they are, what each has a share of."""
