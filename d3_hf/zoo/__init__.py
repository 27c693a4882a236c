"""How often `check` is right: models of which it is known whether they have a backdoor, read one by one, and the rates."""
