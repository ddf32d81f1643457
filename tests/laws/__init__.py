"""The laws of an adapter, over the product of layers, settings and starts."""
