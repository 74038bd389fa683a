"""A mixture, the bounds it must keep, and the nearest mixture inside them."""
