"""Evolving a quantised language model without gradients: the population shares one pass over the weights (see `evolution`)."""
