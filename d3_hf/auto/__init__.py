"""Settings chosen without the trigger: a ladder of recipes, a split of the retain set, a floor on ACC, and the choice."""
