"""What runs: the command lines of the tools, optimizers, hooks, counting."""
