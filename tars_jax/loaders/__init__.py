"""Loaders: model files of every format as configurations and parameters. `opening.load` chooses among them."""
