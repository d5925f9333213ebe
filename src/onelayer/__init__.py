"""onelayer: sequence models, training and experiments on equilibria."""
