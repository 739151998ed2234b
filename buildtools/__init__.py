"""Steps of building and releasing that setup.py and the Makefile use. Nothing of it is installed."""
